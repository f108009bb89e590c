// The CUDA half of packing, behind an interface free of CUDA and torch headers: both sides compile in seconds.
#pragma once

#include <cstdint>

namespace hypercontrast {

// Vectors at most this long have no direction: they stay zero.
constexpr double kMinNorm = 1e-12;
// The label of a row that holds no sample.
constexpr int64_t kAbsent = INT64_MIN;

enum class Scalar { f32, bf16, f16, f64 };

// n samples to write into the first of `slots` rows; the others become absent.
// A row is dim elements of out_type, then, tail_offset bytes from its start, the int64 pair (label, header). Rows begin
// row_bytes apart; rows and tails begin on 16 bytes.
struct PackArguments {
  char* rows;
  int64_t row_bytes, tail_offset, slots;
  Scalar out_type;
  const void* features;  // [n, dim], each sample's elements side by side
  int64_t sample_stride;  // in elements
  Scalar in_type;
  const int64_t* labels;  // [n]
  int64_t label_stride;
  int64_t n, dim, header;
  bool normalize;
};

// Queue the kernel on `stream`, a cudaStream_t. Returns what went wrong, or nullptr.
const char* launch_pack(const PackArguments& arguments, void* stream);

}  // namespace hypercontrast
