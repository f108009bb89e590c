// A loss against prototypes on the CPU, in one call forward and one backward: hypercontrast/_autograd.py over
// hypercontrast/blockwise.py, which are the specification, where nothing but the library's products takes time.
//
// For one process, float32, normalised rows and a temperature of at least 1/64, so that exp(s) needs no shift.
// Everything is contiguous and on the CPU. N samples, K classes, D dimensions, s[j, c] = u_j·w_c/τ of unit vectors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace hypercontrast {

struct PrototypeLoss {
  double inv_temperature;
  int64_t ignore_index;
  bool rows, cols, exclude_own;  // see Rule of hypercontrast/_autograd.py
  int64_t tile_elements, panel_classes, min_block;  // the tiling, see hypercontrast/blockwise.py
};

// (the loss; row_lse [K] or [0], col_lse [N] or [0], positives [N], float64; 1/|x| of features [N] and prototypes [K];
// exp(s), `room` numbers, of as many tiles as fit in their order; M times the gradients of the first three, float64; M).
// `zero_empty`: samples without any logit to sum drop out; `mean`: divided by the samples' weights M, else by 1. M is in
// units of the largest class weight.
// Throws std::invalid_argument for a label that is no class and for a norm that is not finite.
using LossAndSaved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LossAndSaved prototype_loss(const at::Tensor& features, const at::Tensor& prototypes, const at::Tensor& labels,
                            const std::optional<at::Tensor>& weight, const PrototypeLoss& options, bool zero_empty,
                            bool mean, int64_t room);

// Gradients of features and prototypes from `factor`, the loss's own gradient by M, and what the forward saved. One that
// is not wanted comes back empty. With that of the features the sum of all logits times their gradients, else zero.
std::tuple<at::Tensor, at::Tensor, double> prototype_loss_backward(
    double factor, const at::Tensor& features, const at::Tensor& prototypes, const at::Tensor& labels,
    const at::Tensor& row_lse, const at::Tensor& col_lse, const at::Tensor& inv_features,
    const at::Tensor& inv_prototypes, const at::Tensor& kept, const at::Tensor& grad_row, const at::Tensor& grad_col,
    const at::Tensor& grad_pos, const PrototypeLoss& options, bool wants_features, bool wants_prototypes);

}  // namespace hypercontrast
