#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The loops below are compiled once for each vector width, and the machine at hand chooses. x86-64-v4 and v3 are AVX-512
// and AVX2 with fused multiply-adds of every width, a third less time of an exponential; older compilers do not know them.
// Plain avx512f has no narrow ones: what is left over at a row's end would be rounded otherwise in one loop than in another.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORISED
#endif

namespace hypercontrast {
namespace {

constexpr int64_t kRowsAPart = 64;  // rows whose column sums are kept in float32 before they join the float64 ones
constexpr int64_t kSquaresAPart = 256;  // squares that are added in float32
constexpr double kMinNorm = 1e-12;      // of reference.py: shorter vectors have no direction

// Within 1e-7 of exp(x) for |x| < 87, zero below -88: 2^n exp(r), |r| <= ln(2)/2, by r's series up to r^7 / 7!.
// No branch and no call that is not forced inline: a loop with either is not vectorised.
__attribute__((always_inline)) inline float exp_of(float x) {
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;    // ln 2 in two parts, the first of few bits
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127 > 0 ? static_cast<int32_t>(n) + 127 : 0) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

VECTORISED float exponentiate_row(const float* row, int64_t length, float scale, float* out, float* column_sums) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < length; ++i) {
    const float e = exp_of(scale * row[i]);
    out[i] = e;
    column_sums[i] += e;
    sum += e;
  }
  return sum;
}

// e times its weights, e with the bits of exponentiate_row.
VECTORISED void weigh_exponentials(const float* row, int64_t length, float scale, float weight, const float* weights,
                                   float* out) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const float e = exp_of(scale * row[i]);
    out[i] = e * (weight + weights[i]);
  }
}

VECTORISED void weigh_row(const float* row, int64_t length, float weight, const float* weights, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) out[i] = row[i] * (weight + weights[i]);
}

VECTORISED float dot(const float* x, const float* y, int64_t length) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < length; ++i) sum += x[i] * y[i];
  return sum;
}

VECTORISED void project_row(float* grad, const float* x, int64_t length, float radial, float outer,
                            float factor) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) grad[i] = (grad[i] - x[i] * radial) * outer * factor;
}

VECTORISED void scale_row(const float* row, int64_t length, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) out[i] = row[i] * factor;
}

VECTORISED void add_to(double* sums, float* part, int64_t length) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    sums[i] += part[i];
    part[i] = 0;
  }
}

// body(part, first, last) for as many parts of the rows as there are threads: sums over a part's rows are later added in
// the order of parts, so that results repeat.
template <typename Body>
int64_t over_parts(int64_t rows, int64_t columns, const Body& body) {
  const int64_t worthwhile = std::max<int64_t>(1, rows * columns / 16384);
  const int64_t parts = std::min<int64_t>({at::get_num_threads(), rows, worthwhile});
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part, part * rows / parts, (part + 1) * rows / parts);
  });
  return parts;
}

// Blocks of memory that wait for their next use: those of one loss's forward and backward.
class Spare {
 public:
  // The smallest block that is large enough and not more than twice that, of these the one given last, else a new one.
  std::pair<c10::DataPtr, size_t> take(size_t wanted) {
    const std::lock_guard guard(mutex_);
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->second >= wanted && block->second <= 2 * wanted;
      if (fits && (best == blocks_.end() || block->second <= best->second)) best = block;
    }
    if (best == blocks_.end()) return {c10::GetCPUAllocator()->allocate(wanted), wanted};
    auto found = std::move(*best);
    blocks_.erase(best);
    waiting_ -= found.second;
    return found;
  }

  void give(c10::DataPtr block, size_t bytes) {
    if (bytes == 0 || bytes > kMostBytes) return;
    const std::lock_guard guard(mutex_);
    blocks_.emplace_back(std::move(block), bytes);
    waiting_ += bytes;
    while (blocks_.size() > kMostBlocks || waiting_ > kMostBytes) {
      waiting_ -= blocks_.front().second;
      blocks_.pop_front();
    }
  }

  void release() {
    const std::lock_guard guard(mutex_);
    blocks_.clear();
    waiting_ = 0;
  }

 private:
  static constexpr size_t kMostBlocks = 6, kMostBytes = size_t{256} << 20;

  std::mutex mutex_;
  size_t waiting_ = 0;  // bytes
  std::deque<std::pair<c10::DataPtr, size_t>> blocks_;  // the oldest first
};

Spare* spare() {
  static Spare* const only = new Spare;  // never destroyed: tensors may outlive whatever the process ends first
  return only;
}

}  // namespace

void release() { spare()->release(); }

at::Tensor reusable(int64_t elements) {
  using Block = std::pair<c10::DataPtr, size_t>;
  const size_t bytes = elements * sizeof(float);
  Block* const block = new Block(spare()->take(bytes));
  const auto give_back = [](void* context) {
    const std::unique_ptr<Block> given(static_cast<Block*>(context));
    spare()->give(std::move(given->first), given->second);
  };
  c10::DataPtr memory(block->first.get(), block, give_back, at::kCPU);
  // Resizable, as any gradient is: what is larger then comes from the usual allocator.
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(memory), c10::GetCPUAllocator(), true);
  return at::empty({0}, at::kFloat).set_(std::move(storage), 0, {elements});
}

void exponentiate(const at::Tensor& tile, const std::optional<at::Tensor>& factors,
                  const std::optional<at::Tensor>& own, const std::optional<at::Tensor>& positives, bool exclude_own,
                  const std::optional<at::Tensor>& row_sums, const std::optional<at::Tensor>& column_sums) {
  const int64_t rows = tile.size(0), columns = tile.size(1);
  float *const entries = tile.data_ptr<float>(), *const positive = data<float>(positives);
  const float* const factor = data<float>(factors);
  const int64_t* const own_column = data<int64_t>(own);
  double *const row_sum = data<double>(row_sums), *const column_sum = data<double>(column_sums);
  std::vector<std::vector<double>> sums(std::max(1, at::get_num_threads()));
  const int64_t parts = over_parts(rows, columns, [&](int64_t part, int64_t first, int64_t last) {
    std::vector<float> few(columns);
    if (column_sum) sums[part].resize(columns);
    for (int64_t r = first; r < last; ++r) {
      float* const row = entries + r * columns;
      const float scale = factor ? factor[r] : 1.0f;
      const int64_t c = own_column ? own_column[r] : -1;
      if (c >= 0) positive[r] = scale * row[c];
      float sum;
      if (c >= 0 && exclude_own) {
        row[c] = 0;
        sum = exponentiate_row(row, c, scale, row, few.data());
        sum += exponentiate_row(row + c + 1, columns - c - 1, scale, row + c + 1, few.data() + c + 1);
      } else {
        sum = exponentiate_row(row, columns, scale, row, few.data());
      }
      if (row_sum) row_sum[r] += sum;
      if (column_sum && ((r - first) % kRowsAPart == kRowsAPart - 1 || r == last - 1)) {
        add_to(sums[part].data(), few.data(), columns);
      }
    }
  });
  for (int64_t part = 0; column_sum && part < parts; ++part) {
    for (int64_t c = 0; c < columns; ++c) column_sum[c] += sums[part][c];
  }
}

void weigh(const at::Tensor& tile, const std::optional<at::Tensor>& factors, bool are_exponentials,
           const std::optional<at::Tensor>& row_weights, const std::optional<at::Tensor>& column_weights,
           const at::Tensor& out) {
  const int64_t rows = tile.size(0), columns = tile.size(1);
  const float *const entries = tile.data_ptr<float>(), *const factor = data<float>(factors),
              *const row_weight = data<float>(row_weights);
  const std::vector<float> zeros(column_weights ? 0 : columns);
  const float* const weights = column_weights ? column_weights->data_ptr<float>() : zeros.data();
  float* const result = out.data_ptr<float>();
  over_parts(rows, columns, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* const row = entries + r * columns;
      float* const to = result + r * columns;
      const float weight = row_weight ? row_weight[r] : 0.0f;
      if (are_exponentials) {
        weigh_row(row, columns, weight, weights, to);
      } else {
        weigh_exponentials(row, columns, factor ? factor[r] : 1.0f, weight, weights, to);
      }
    }
  });
}

double through_norm(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inv, const at::Tensor& outer,
                    bool project, double factor) {
  const int64_t rows = grad.size(0), width = grad.size(1);
  float* const gradients = grad.data_ptr<float>();
  const float *const vectors = x.data_ptr<float>(), *const inverse = inv.data_ptr<float>(),
              *const scale = outer.data_ptr<float>();
  std::vector<double> totals(std::max(1, at::get_num_threads()), 0.0);
  over_parts(rows, width, [&](int64_t part, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* const g = gradients + r * width;
      const float* const v = vectors + r * width;
      const float radial = dot(v, g, width);
      totals[part] += double(radial) * scale[r];
      project_row(g, v, width, project ? radial * inverse[r] * inverse[r] : 0.0f, scale[r], static_cast<float>(factor));
    }
  });
  double total = 0;
  for (double part : totals) total += part;
  return factor * total;
}

at::Tensor inverse_norms(const char* name, const at::Tensor& x) {
  const int64_t rows = x.size(0), width = x.size(1);
  at::Tensor inverse = at::empty({rows}, at::kFloat);
  const float* const vectors = x.data_ptr<float>();
  float* const out = inverse.data_ptr<float>();
  over_parts(rows, width, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* const v = vectors + r * width;
      double squares = 0;
      for (int64_t c = 0; c < width; c += kSquaresAPart) squares += dot(v + c, v + c, std::min(kSquaresAPart, width - c));
      const double norm = std::sqrt(squares);
      out[r] = norm <= kMinNorm ? 0.0f : static_cast<float>(1 / norm);
      if (!std::isfinite(norm)) out[r] = std::isnan(norm) ? NAN : INFINITY;
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    if (std::isfinite(out[r])) continue;
    throw std::invalid_argument(std::string(name) + " must have finite norms, got " + (std::isnan(out[r]) ? "nan" : "inf") +
                                " in row " + std::to_string(r));
  }
  return inverse;
}

at::Tensor weights(const at::Tensor& lse, const at::Tensor& grad) {
  at::Tensor found = at::empty({lse.numel()}, at::kFloat);
  const double *const sums = lse.data_ptr<double>(), *const gradients = grad.data_ptr<double>();
  float* const weight = found.data_ptr<float>();
  for (int64_t i = 0; i < lse.numel(); ++i) {
    weight[i] = std::isinf(sums[i]) ? 0 : static_cast<float>(gradients[i] * std::exp(-sums[i]));
  }
  return found;
}

void scale_rows(const at::Tensor& x, const at::Tensor& factors, const at::Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1);
  const float *const vectors = x.data_ptr<float>(), *const factor = factors.data_ptr<float>();
  float* const scaled = out.data_ptr<float>();
  over_parts(rows, width, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) scale_row(vectors + r * width, width, factor[r], scaled + r * width);
  });
}

}  // namespace hypercontrast
