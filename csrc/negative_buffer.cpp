#include "negative_buffer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/div.h>
#include <ATen/ops/le.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/masked_fill.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <limits>

#include "pack.h"

namespace hypercontrast {
namespace {

// The same operators in the same order as the Python twin, so that the two are bitwise equal.
void pack_by_operators(const at::Tensor& row_features, const at::Tensor& row_tails, const at::Tensor& features,
                       const at::Tensor& labels, int64_t header, bool normalize) {
  const int64_t n = features.size(0), absent = row_features.size(0) - n;
  at::Tensor rows = row_features.narrow(0, 0, n);
  if (normalize) {
    const at::Tensor x = features.to(at::promote_types(features.scalar_type(), at::kFloat));
    const at::Tensor norm = at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, /*keepdim=*/true);
    at::div_out(rows, x, norm.masked_fill(norm.le(kMinNorm), std::numeric_limits<double>::infinity()));
  } else {
    rows.copy_(features);
  }
  row_features.narrow(0, n, absent).zero_();
  const at::Tensor row_labels = row_tails.select(1, 0);
  row_labels.narrow(0, 0, n).copy_(labels);
  row_labels.narrow(0, n, absent).fill_(kAbsent);
  row_tails.select(1, 1).fill_(header);
}

#ifdef HYPERCONTRAST_CUDA
Scalar scalar(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Scalar::f32;
    case at::kBFloat16: return Scalar::bf16;
    case at::kHalf: return Scalar::f16;
    case at::kDouble: return Scalar::f64;
    default: TORCH_CHECK(false, "no kernel packs ", x.scalar_type());
  }
}

void pack_by_kernel(const at::Tensor& row_features, const at::Tensor& row_tails, const at::Tensor& features,
                    const at::Tensor& labels, int64_t header, bool normalize) {
  const at::Tensor samples = features.stride(1) == 1 ? features : features.contiguous();
  auto* const rows = static_cast<char*>(row_features.data_ptr());
  const PackArguments arguments{
      .rows = rows,
      .row_bytes = row_tails.stride(0) * static_cast<int64_t>(sizeof(int64_t)),
      .tail_offset = static_cast<char*>(row_tails.data_ptr()) - rows,
      .slots = row_features.size(0),
      .out_type = scalar(row_features),
      .features = samples.const_data_ptr(),
      .sample_stride = samples.stride(0),
      .in_type = scalar(samples),
      .labels = labels.const_data_ptr<int64_t>(),
      .label_stride = labels.stride(0),
      .n = samples.size(0),
      .dim = samples.size(1),
      .header = header,
      .normalize = normalize,
  };
  const c10::DeviceGuard guard(samples.device());
  // The generic interface: no CUDA header is needed here.
  const c10::impl::VirtualGuardImpl device(samples.device().type());
  const char* error = launch_pack(arguments, device.getStreamNativeHandle(device.getStream(samples.device())));
  TORCH_CHECK(error == nullptr, "packing the negative buffer: ", error);
  row_features.unsafeGetTensorImpl()->bump_version();  // autograd notices a row overwritten before its backward
}
#endif

}  // namespace

void pack(const at::Tensor& row_features, const at::Tensor& row_tails, const at::Tensor& features,
          const at::Tensor& labels, int64_t header, bool normalize) {
  const at::NoGradGuard no_grad;
#ifdef HYPERCONTRAST_CUDA
  if (features.is_cuda()) return pack_by_kernel(row_features, row_tails, features, labels, header, normalize);
#endif
  pack_by_operators(row_features, row_tails, features, labels, header, normalize);
}

c10::intrusive_ptr<c10d::Work> gather(at::Tensor everyone, at::Tensor mine, const at::Tensor& row_features,
                                      const at::Tensor& row_tails, const at::Tensor& features,
                                      const at::Tensor& labels, int64_t header, bool normalize,
                                      const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  pack(row_features, row_tails, features, labels, header, normalize);
  return group->_allgather_base(everyone, mine);
}

int64_t push(const at::Tensor& ring_features, const at::Tensor& ring_tails, int64_t cursor, const at::Tensor& features,
             const at::Tensor& labels, int64_t header, bool normalize) {
  const int64_t size = ring_features.size(0), kept = std::min(features.size(0), size);
  const int64_t oldest = features.size(0) - kept, straight = std::min(kept, size - cursor);
  const auto write = [&](int64_t row, int64_t sample, int64_t count) {
    if (count == 0) return;
    pack(ring_features.narrow(0, row, count), ring_tails.narrow(0, row, count), features.narrow(0, sample, count),
         labels.narrow(0, sample, count), header, normalize);
  };
  write(cursor, oldest, straight);
  write(0, oldest + straight, kept - straight);
  return (cursor + kept) % size;
}

}  // namespace hypercontrast
