// Matrix products of float32 on the CPU: PyTorch's own, by whichever of its libraries is the faster one on this machine.
#pragma once

#include <ATen/core/Tensor.h>

namespace hypercontrast {

// Whether it is oneDNN that multiplies matrices of a million multiplications and more.
bool takes_onednn();

// out [m, n] <- a [m, k] b [k, n], added to what is there if `add`. The operands may be transposed.
void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add);

}  // namespace hypercontrast
