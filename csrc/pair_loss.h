// SupCon of a batch against itself on the CPU, in one call forward and one backward: hypercontrast/_supcon.py over
// hypercontrast/blockwise_pairs.py, which are the specification, where nothing but the library's products takes time.
//
// For one process, float32, normalised rows, a temperature of at least 1/64, so that exp(s) needs no shift, and the
// mean over positives outside the logarithm. Everything is contiguous and on the CPU. N samples, D dimensions.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace hypercontrast {

// (the loss times `scale`; how many anchors have no positive, int64; M; class numbers [N] int64, -1 for a label of
// `absent`, whose row is not there; log-sum-exps and sums of positives [N], float64; 1/|x| [N]; M times the gradients of
// those two, float64; exp(s), `room` numbers, tile after tile, if any). `exclude`: the mean is over anchors that have
// positives; `mean`: divided by their number M, else M = 1. `edge`: rows and columns of a tile. `room`: the entries of all
// tiles on and above the diagonal, or none. Throws std::invalid_argument for a norm that is not finite.
using PairLossAndSaved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                    at::Tensor, at::Tensor, at::Tensor>;
PairLossAndSaved pair_loss(const at::Tensor& features, const at::Tensor& labels, int64_t absent, double inv_temperature,
                           double scale, bool exclude, bool mean, int64_t edge, int64_t room);

// Gradient of the features from `factor`, the loss's own gradient by M, and what the forward saved. And, if it is wanted,
// the sum of all logits times their gradients, each pair from both of its sides; else zero.
std::tuple<at::Tensor, double> pair_loss_backward(double factor, const at::Tensor& features, const at::Tensor& ids,
                                                  const at::Tensor& lse, const at::Tensor& inv_norms,
                                                  const at::Tensor& grad_lse, const at::Tensor& grad_positives,
                                                  const at::Tensor& kept, double inv_temperature, int64_t edge,
                                                  bool wants_logit_grad_sum);

}  // namespace hypercontrast
