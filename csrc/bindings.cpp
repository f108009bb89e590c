// Names only: what hypercontrast._C offers to Python.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "negative_buffer.h"
#include "pair_loss.h"
#include "product.h"
#include "prototype_loss.h"
#include "tiles.h"

PYBIND11_MODULE(_C, module) {
  using without_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def("pack", &hypercontrast::pack, without_gil());
  module.def("gather", &hypercontrast::gather, without_gil());
  module.def("push", &hypercontrast::push, without_gil());
  pybind11::class_<hypercontrast::PrototypeLoss>(module, "PrototypeLoss")
      .def(pybind11::init<double, int64_t, bool, bool, bool, int64_t, int64_t, int64_t>());
  module.def("prototype_loss", &hypercontrast::prototype_loss, without_gil());
  module.def("prototype_loss_backward", &hypercontrast::prototype_loss_backward, without_gil());
  module.def("pair_loss", &hypercontrast::pair_loss, without_gil());
  module.def("pair_loss_backward", &hypercontrast::pair_loss_backward, without_gil());
  module.def("product", &hypercontrast::product, without_gil());
  module.def("takes_onednn", &hypercontrast::takes_onednn);
  module.def("exponentiate", &hypercontrast::exponentiate, without_gil());
  module.def("weigh", &hypercontrast::weigh, without_gil());
  module.def("reusable", &hypercontrast::reusable, without_gil());
  module.def("release", &hypercontrast::release, without_gil());
  module.def("through_norm", &hypercontrast::through_norm, without_gil());
  // Compared at import: an extension built for another torch or from older sources is not used.
  module.attr("TORCH") = TORCH_VERSION;
  module.attr("REVISION") = hypercontrast::kRevision;
#ifdef HYPERCONTRAST_CUDA
  module.attr("CUDA") = true;
#else
  module.attr("CUDA") = false;
#endif
}
