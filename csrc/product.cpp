#include "product.h"

#include <ATen/Context.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

#include <exception>

#include "tiles.h"

#if defined(__linux__) && defined(__x86_64__)
// out <- beta out + alpha a b by oneDNN: what PyTorch multiplies bfloat16 with. It is exported but in no installed header;
// weak, so that a torch without it still loads this extension.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}
#endif

namespace hypercontrast {
namespace {

using Matmul = void (*)(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, float beta, float alpha);

// Below it oneDNN's preparations take longer than the product.
constexpr int64_t kWorthwhile = int64_t{1} << 20;  // multiplications

// oneDNN's product where it is the faster one, else null. MKL, which multiplies float32 in PyTorch, keeps to AVX2 on
// processors that are not Intel's; oneDNN does not, and takes half the time on AMD's family 26, the one that was measured.
Matmul faster_matmul() {
#if defined(__linux__) && defined(__x86_64__)
  const bool is_faster = !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is_faster) return &at::native::mkldnn_matmul;
#endif
  return nullptr;
}

// No header promises that this torch takes float32 there.
bool takes_float32(Matmul matmul) {
  constexpr int64_t size = 32;
  const at::Tensor ones = at::ones({size, size}), out = at::ones({size, size});
  try {
    matmul(ones, ones, out, 1.0f, 1.0f);
  } catch (const std::exception&) {
    return false;
  }
  return out.eq(size + 1).all().item<bool>();
}

// What multiplies large matrices in place of PyTorch's own, if there is something.
Matmul onednn() {
  static const Matmul found = faster_matmul(), usable = found && takes_float32(found) ? found : nullptr;
  return at::globalContext().userEnabledMkldnn() ? usable : nullptr;
}

bool is_large(const at::Tensor& a, const at::Tensor& b) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  // A single row or column is another kernel's, which rounds more, and crashes in torch 2.13.
  return m > 1 && n > 1 && m * k * n >= kWorthwhile;
}

}  // namespace

bool takes_onednn() { return onednn() != nullptr; }

void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  const Plainly plainly;
  const Matmul matmul = is_large(a, b) ? onednn() : nullptr;
  if (matmul) {
    matmul(a, b, out, add ? 1.0f : 0.0f, 1.0f);
    return;
  }
  at::Tensor result = out;
  if (add) {
    result.addmm_(a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

}  // namespace hypercontrast
