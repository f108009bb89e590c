#include "pair_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "product.h"
#include "tiles.h"

namespace hypercontrast {
namespace {

// The samples that are there, sorted by class: positives lie near the diagonal, those of a row side by side.
struct Sorted {
  at::Tensor order;                 // [n] their places in the batch
  std::vector<int64_t> begin, end;  // [n] where each one's class begins and ends
  int64_t n;

  Sorted(const at::Tensor& labels, int64_t absent) {
    const auto [values, places] = labels.sort(/*stable=*/std::optional(true), /*dim=*/0);
    const int64_t total = labels.numel();
    const int64_t* label = values.data_ptr<int64_t>();
    const int64_t missing = std::count(label, label + total, absent);  // the least of all values, hence first
    order = places.narrow(0, missing, total - missing);
    n = total - missing;
    label += missing;
    begin.resize(n);
    end.resize(n);
    for (int64_t i = 0; i < n; ++i) begin[i] = i > 0 && label[i] == label[i - 1] ? begin[i - 1] : i;
    for (int64_t i = n - 1; i >= 0; --i) end[i] = i < n - 1 && label[i] == label[i + 1] ? end[i + 1] : i + 1;
  }

  // u/√τ, so that products of two are logits.
  at::Tensor units(const at::Tensor& features, const at::Tensor& inv_norms, double root_scale) const {
    at::Tensor rows = reusable_matrix(n, features.size(1));
    at::index_select_out(rows, features, 0, order);
    scale_rows(rows, inv_norms.index_select(0, order).mul_(root_scale), rows);
    return rows;
  }

  // body(tile, first row, rows, first column, columns) for the tiles on and above the diagonal. In `kept` they lie one
  // after the other; without it all are the same memory. Returns how many entries they have.
  template <typename Body>
  int64_t tiles(const at::Tensor& kept, int64_t edge, const Body& body) const {
    const bool keeps = kept.numel() > 0;
    const at::Tensor memory = keeps ? kept : reusable(edge * edge);
    int64_t passed = 0;
    for (int64_t r = 0; r < n; r += edge) {
      for (int64_t c = r; c < n; c += edge) {
        const int64_t rows = std::min(edge, n - r), cols = std::min(edge, n - c);
        body(matrix_at(memory, keeps ? passed : 0, rows, cols), r, rows, c, cols);
        passed += rows * cols;
      }
    }
    return passed;
  }
};

// Each row's logits with the others of its class, added up: u·(C - u), C the sum of the class. In float64, since at
// collapse a class is the same number again and again, which float32 rounds the same way every time.
std::vector<double> sums_of_positives(const Sorted& sorted, const at::Tensor& units) {
  const int64_t width = units.size(1);
  const float* const rows = units.data_ptr<float>();
  std::vector<double> positives(sorted.n), sum(width);
  for (int64_t first = 0; first < sorted.n; first = sorted.end[first]) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t i = first; i < sorted.end[first]; ++i) {
      for (int64_t d = 0; d < width; ++d) sum[d] += rows[i * width + d];
    }
    at::parallel_for(first, sorted.end[first], 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double total = 0;
        for (int64_t d = 0; d < width; ++d) total += rows[i * width + d] * (sum[d] - rows[i * width + d]);
        positives[i] = total;
      }
    });
  }
  return positives;
}

}  // namespace

PairLossAndSaved pair_loss(const at::Tensor& features, const at::Tensor& labels, int64_t absent, double inv_temperature,
                           double scale, bool exclude, bool mean, int64_t edge, int64_t room) {
  const Plainly plainly;
  const int64_t total = features.size(0);
  const Sorted sorted(labels, absent);
  const at::Tensor inv_norms = inverse_norms("features", features);
  const at::Tensor units = sorted.units(features, inv_norms, std::sqrt(inv_temperature));
  const at::Tensor sums = at::zeros({sorted.n}, at::kDouble), kept = reusable(room);
  const at::Tensor diagonal = at::arange(edge, at::kLong), unread = at::empty({edge}, at::kFloat);
  const int64_t used = sorted.tiles(kept, edge, [&](const at::Tensor& s, int64_t r, int64_t rows, int64_t c, int64_t cols) {
    product(units.narrow(0, r, rows), units.narrow(0, c, cols).t(), s, false);
    if (r == c) {
      exponentiate(s, {}, diagonal.narrow(0, 0, rows), unread.narrow(0, 0, rows), true, sums.narrow(0, r, rows), {});
    } else {
      exponentiate(s, {}, {}, {}, false, sums.narrow(0, r, rows), sums.narrow(0, c, cols));
    }
  });
  if (room > 0) kept.narrow(0, used, room - used).zero_();

  const std::vector<double> positives = sums_of_positives(sorted, units);
  const at::Tensor ids = at::full({total}, -1, at::kLong);
  const at::Tensor lse = at::full({total}, -std::numeric_limits<double>::infinity(), at::kDouble);
  const at::Tensor all_positives = at::zeros({total}, at::kDouble);
  const at::Tensor grad_lse = at::zeros_like(lse), grad_positives = at::zeros_like(lse);
  const int64_t* const place = sorted.order.data_ptr<int64_t>();
  int64_t alone = total - sorted.n;
  double loss = 0;
  for (int64_t i = 0, id = -1; i < sorted.n; ++i) {
    if (sorted.begin[i] == i) ++id;
    const int64_t j = place[i], others = sorted.end[i] - sorted.begin[i] - 1;
    ids.data_ptr<int64_t>()[j] = id;
    const double log_sum = lse.data_ptr<double>()[j] = std::log(sums.data_ptr<double>()[i]);
    if (others == 0) {
      ++alone;
      continue;
    }
    all_positives.data_ptr<double>()[j] = positives[i];
    loss += log_sum - positives[i] / others;
    grad_lse.data_ptr<double>()[j] = scale;
    grad_positives.data_ptr<double>()[j] = -scale / others;
  }
  const double divisor = mean ? std::max<int64_t>(1, exclude ? total - alone : total) : 1;
  return {at::scalar_tensor(loss * scale / divisor, at::kFloat), at::scalar_tensor(alone, at::kLong),
          at::scalar_tensor(divisor, at::kDouble), ids, lse, all_positives, inv_norms, grad_lse, grad_positives, kept};
}

std::tuple<at::Tensor, double> pair_loss_backward(double factor, const at::Tensor& features, const at::Tensor& ids,
                                                  const at::Tensor& lse, const at::Tensor& inv_norms,
                                                  const at::Tensor& grad_lse, const at::Tensor& grad_positives,
                                                  const at::Tensor& kept, double inv_temperature, int64_t edge,
                                                  bool wants_logit_grad_sum) {
  const Plainly plainly;
  const double root_scale = std::sqrt(inv_temperature);
  const Sorted sorted(ids, -1);
  const at::Tensor units = sorted.units(features, inv_norms, root_scale);
  const auto sort = [&](const at::Tensor& x) { return x.index_select(0, sorted.order); };
  const at::Tensor weight = weights(sort(lse), sort(grad_lse));
  const at::Tensor positive = sort(grad_positives).to(at::kFloat);
  const float* const of_positive = positive.data_ptr<float>();
  at::Tensor grad = reusable_matrix(sorted.n, features.size(1)).zero_();
  const bool keeps = kept.numel() > 0;
  const at::Tensor memory = reusable(keeps ? edge * edge : 0);
  sorted.tiles(kept, edge, [&](const at::Tensor& s, int64_t r, int64_t rows, int64_t c, int64_t cols) {
    const at::Tensor of_rows = units.narrow(0, r, rows), of_cols = units.narrow(0, c, cols);
    if (!keeps) product(of_rows, of_cols.t(), s, false);
    const at::Tensor g = keeps ? matrix_at(memory, 0, rows, cols) : s;  // a graph may be walked again
    weigh(s, {}, keeps, weight.narrow(0, r, rows), weight.narrow(0, c, cols), g);
    // Positives join in before the products: added to them they would leave the rounding of both behind.
    at::parallel_for(r, r + rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* const row = g.data_ptr<float>() + (i - r) * cols;
        const int64_t last = std::min(sorted.end[i], c + cols);
        for (int64_t j = std::max(sorted.begin[i], c); j < last; ++j) row[j - c] += of_positive[i] + of_positive[j];
        if (r == c) row[i - c] = 0;
      }
    });
    product(g, of_cols, grad.narrow(0, r, rows), true);
    if (r != c) product(g.t(), of_rows, grad.narrow(0, c, cols), true);
  });
  const double logit_grad_sum = wants_logit_grad_sum ? factor * units.mul(grad).sum(at::kDouble).item<double>() : 0;
  // On the units, whose length is √τ: dL/dx = (g - (û·g) û) / (|x| √τ).
  const at::Tensor inv_units = at::full({sorted.n}, 1 / root_scale, at::kFloat);
  through_norm(grad, units, inv_units, sort(inv_norms).mul_(root_scale), true, factor);
  // The units have served: the samples' order takes their memory, where all are there.
  const at::Tensor all = sorted.n == features.size(0) ? units : at::zeros_like(features);
  return {all.index_copy_(0, sorted.order, grad), logit_grad_sum};
}

}  // namespace hypercontrast
