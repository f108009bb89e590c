#include "product.h"

#include <ATen/Context.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

#include <exception>

#include "tiles.h"

// out <- beta out + alpha a b by oneDNN: what PyTorch multiplies bfloat16 with. It is exported but in no installed header;
// weak, so that a torch without it still loads this extension.
#if defined(__linux__) && defined(__x86_64__)
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}
#endif

namespace hypercontrast {
namespace {

#if defined(__linux__) && defined(__x86_64__)
// Below it oneDNN's preparations take longer than the product.
constexpr int64_t kWorthwhile = int64_t{1} << 20;  // multiplications

// MKL, which multiplies float32 in PyTorch, keeps to AVX2 on processors that are not Intel's; oneDNN does not, and takes
// half the time on AMD's family 26, the one that was measured.
bool is_faster_by_onednn() {
  return !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

// No header promises that this torch takes float32 there.
bool takes_float32() {
  if (&at::native::mkldnn_matmul == nullptr) return false;
  constexpr int64_t size = 32;
  const at::Tensor ones = at::ones({size, size}), out = at::ones({size, size});
  try {
    at::native::mkldnn_matmul(ones, ones, out, 1.0f, 1.0f);
  } catch (const std::exception&) {
    return false;
  }
  return out.eq(size + 1).all().item<bool>();
}

bool are_worthwhile(const at::Tensor& a, const at::Tensor& b) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  // A single row or column is another kernel's, which rounds more, and crashes in torch 2.13.
  return m > 1 && n > 1 && m * k * n >= kWorthwhile;
}
#endif

}  // namespace

bool takes_onednn() {
#if defined(__linux__) && defined(__x86_64__)
  static const bool is_there = is_faster_by_onednn() && takes_float32();
  return is_there && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  const Plainly plainly;
#if defined(__linux__) && defined(__x86_64__)
  if (are_worthwhile(a, b) && takes_onednn()) {
    at::native::mkldnn_matmul(a, b, out, add ? 1.0f : 0.0f, 1.0f);
    return;
  }
#endif
  at::Tensor result = out;
  if (add) {
    result.addmm_(a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

}  // namespace hypercontrast
