// Normalise, cast and pack samples into rows of the negative buffer, in one kernel.
//
//   u = z/|z|, zero where |z| <= 1e-12   (or z itself, without `normalize`)
//
// A warp writes a row. It reads its sample twice, for the norm and for the quotients; the second time from L1. Sums run
// in float32, in float64 for float64 samples. Bytes moved: n·D in, slots·(D + 16 bytes) out.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "pack.h"

namespace hypercontrast {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

// Four elements, moved by as few instructions as their alignment allows.
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Quad {
  T x[4];
};

// Conversions by name: torch's build switches the implicit ones off.
__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ double widen(double x) { return x; }

template <typename Out, typename Sum>
__device__ Out narrow(Sum x) {
  if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
    return __float2bfloat16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<Out, __half>) {
    return __float2half(static_cast<float>(x));
  } else {
    return static_cast<Out>(x);
  }
}

template <typename T>
__device__ T square(T x) {
  return x * x;
}

template <typename Sum>
__device__ Sum warp_sum(Sum x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
  return x;
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) pack_kernel(const PackArguments a, const bool quads) {
  using Sum = decltype(widen(In{}));
  // int64 first: a buffer may pass 2^31 elements.
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= a.slots) return;

  char* const start = a.rows + row * a.row_bytes;
  Out* const out = reinterpret_cast<Out*>(start);
  const bool present = row < a.n;
  if (lane == 0) {
    const int64_t label = present ? a.labels[row * a.label_stride] : kAbsent;
    *reinterpret_cast<longlong2*>(start + a.tail_offset) = make_longlong2(label, a.header);
  }
  if (!present) {
    for (int64_t i = lane; i < a.dim; i += kWarp) out[i] = narrow<Out>(0.0f);
    return;
  }

  const In* const in = static_cast<const In*>(a.features) + row * a.sample_stride;
  const auto* const in4 = reinterpret_cast<const Quad<In>*>(in);
  auto* const out4 = reinterpret_cast<Quad<Out>*>(out);
  const int64_t num_quads = quads ? a.dim / 4 : 0;

  Sum norm = 1;
  if (a.normalize) {
    Sum squares = 0;
    for (int64_t i = lane; i < num_quads; i += kWarp) {
      const Quad<In> z = in4[i];
#pragma unroll
      for (int k = 0; k < 4; ++k) squares += square(widen(z.x[k]));
    }
    for (int64_t i = 4 * num_quads + lane; i < a.dim; i += kWarp) squares += square(widen(in[i]));
    norm = sqrt(warp_sum(squares));
  }
  const bool zero = norm <= static_cast<Sum>(kMinNorm);
  const auto unit = [&](In z) { return narrow<Out>(zero ? Sum(0) : widen(z) / norm); };

  for (int64_t i = lane; i < num_quads; i += kWarp) {
    const Quad<In> z = in4[i];
    Quad<Out> u;
#pragma unroll
    for (int k = 0; k < 4; ++k) u.x[k] = unit(z.x[k]);
    out4[i] = u;
  }
  for (int64_t i = 4 * num_quads + lane; i < a.dim; i += kWarp) out[i] = unit(in[i]);
}

template <typename In, typename Out>
void launch(const PackArguments& a, cudaStream_t stream) {
  const int64_t blocks = (a.slots + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const bool aligned = reinterpret_cast<uintptr_t>(a.features) % alignof(Quad<In>) == 0;
  const bool quads = aligned && a.sample_stride % 4 == 0;
  pack_kernel<In, Out><<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, stream>>>(a, quads);
}

template <typename In>
void launch_from(const PackArguments& a, cudaStream_t stream) {
  switch (a.out_type) {
    case Scalar::f32: return launch<In, float>(a, stream);
    case Scalar::bf16: return launch<In, __nv_bfloat16>(a, stream);
    case Scalar::f16: return launch<In, __half>(a, stream);
    case Scalar::f64: return launch<In, double>(a, stream);
  }
}

void launch_any(const PackArguments& a, cudaStream_t stream) {
  switch (a.in_type) {
    case Scalar::f32: return launch_from<float>(a, stream);
    case Scalar::bf16: return launch_from<__nv_bfloat16>(a, stream);
    case Scalar::f16: return launch_from<__half>(a, stream);
    case Scalar::f64: return launch_from<double>(a, stream);
  }
}

}  // namespace

const char* launch_pack(const PackArguments& arguments, void* stream) {
  if (arguments.slots > 0) launch_any(arguments, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace hypercontrast
