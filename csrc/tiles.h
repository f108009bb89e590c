// What a tile of logits goes through between two matrix products on the CPU, in one pass where operators take several:
// the inner loop of hypercontrast/blockwise.py, whose operators are the specification.
//
// Tensors are contiguous float32 on the CPU; these functions trust their arguments. B samples, P classes, D dimensions.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace hypercontrast {

// While it lives, operators record no graph and follow no autocast.
struct Plainly {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                                 c10::autocast_dispatch_keyset};
};

// The numbers of a tensor that may not be there, or null.
template <typename T>
T* data(const std::optional<at::Tensor>& x) {
  return x ? x->data_ptr<T>() : nullptr;
}

// tile [B, P] <- exp(factors [B] tile), of magnitudes below 87; what was summed joins row_sums [B] and column_sums [P],
// float64. A row's entry at own [B] (negative: none) is first written to positives [B], and counts as zero if exclude_own.
void exponentiate(const at::Tensor& tile, const std::optional<at::Tensor>& factors,
                  const std::optional<at::Tensor>& own, const std::optional<at::Tensor>& positives, bool exclude_own,
                  const std::optional<at::Tensor>& row_sums, const std::optional<at::Tensor>& column_sums);

// out [B, P] <- e (row_weights [B] + column_weights [P]), e the tile itself or exp(factors tile), bit by bit that of
// exponentiate. out may be the tile.
void weigh(const at::Tensor& tile, const std::optional<at::Tensor>& factors, bool are_exponentials,
           const std::optional<at::Tensor>& row_weights, const std::optional<at::Tensor>& column_weights,
           const at::Tensor& out);

// grad [n, D] <- factor outer (grad - (x·grad) inv² x), the last part if `project`. Returns factor Σ outer (x·grad).
// inv, outer [n]. The factor is that of the whole loss: in the weights of exponentials a small one would underflow.
double through_norm(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inv, const at::Tensor& outer,
                    bool project, double factor);

// 1/|x| of each row [n], zero where |x| <= 1e-12. Throws std::invalid_argument, which names `name`, where one is not finite.
at::Tensor inverse_norms(const char* name, const at::Tensor& x);

// out [n, D] <- the rows of x times their factors [n].
void scale_rows(const at::Tensor& x, const at::Tensor& factors, const at::Tensor& out);

// grad exp(-lse) [n] in float32, of float64: what the exponentials of a sum weigh in its gradient. A sum over nothing has
// none.
at::Tensor weights(const at::Tensor& lse, const at::Tensor& grad);

// [elements] float32, not initialised. Its memory serves a later call once the tensor is gone: a training step asks for
// the same sizes every time, and pages fresh from the system cost more than what is written to them. 256 MiB wait at most.
at::Tensor reusable(int64_t elements);

inline at::Tensor reusable_matrix(int64_t rows, int64_t cols) { return reusable(rows * cols).view({rows, cols}); }

// [rows, cols] out of a vector, from `start` on.
inline at::Tensor matrix_at(const at::Tensor& memory, int64_t start, int64_t rows, int64_t cols) {
  return memory.narrow(0, start, rows * cols).view({rows, cols});
}

// Give back to the system the memory that waits for the next `reusable`.
void release();

}  // namespace hypercontrast
