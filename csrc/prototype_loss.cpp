#include "prototype_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "product.h"
#include "tiles.h"

namespace hypercontrast {
namespace {

constexpr double kMinFoldedScale = 1e-32, kMaxFoldedScale = 1e32;  // MIN_, MAX_FOLDED_SCALE of blockwise.py
// Absent classes are left out where at least one in so many is absent: their rows are gathered and scattered then.
constexpr int64_t kWorthwhileAbsence = 8;

std::mutex kept_in_use;

// What is computed, and the walk over it: blocks of samples within panels of classes.
struct Walk {
  std::optional<at::Tensor> samples, classes;  // which of them count, if not all do
  at::Tensor labels;                           // [n] among the classes that are computed
  int64_t n, k, height, width;                 // samples and classes, in all and in a tile

  Walk(const at::Tensor& all_labels, int64_t num_classes, int64_t dim, const PrototypeLoss& o) {
    const int64_t total = all_labels.numel();
    const int64_t* const label = all_labels.data_ptr<int64_t>();
    std::vector<int64_t> counts(num_classes, 0);
    n = 0;
    for (int64_t j = 0; j < total; ++j) {
      if (label[j] == o.ignore_index) continue;
      if (label[j] < 0 || label[j] >= num_classes) {
        throw std::invalid_argument("labels must lie in [0, " + std::to_string(num_classes) + "), got " +
                                    std::to_string(label[j]));
      }
      ++counts[label[j]];
      ++n;
    }
    labels = all_labels;
    if (n < total) {
      samples = at::empty({n}, at::kLong);
      int64_t* sample = samples->data_ptr<int64_t>();
      for (int64_t j = 0; j < total; ++j) {
        if (label[j] != o.ignore_index) *sample++ = j;
      }
      labels = all_labels.index_select(0, *samples);
    }
    k = num_classes;
    const int64_t absent = std::count(counts.begin(), counts.end(), 0);
    if (o.rows && !o.cols && absent * kWorthwhileAbsence >= num_classes) {
      k -= absent;
      classes = at::empty({k}, at::kLong);
      int64_t* const present = classes->data_ptr<int64_t>();
      for (int64_t c = 0, row = 0; c < num_classes; ++c) {
        if (counts[c] == 0) continue;
        present[row] = c;
        counts[c] = row++;
      }
      labels = labels.clone();
      int64_t* const own = labels.data_ptr<int64_t>();
      for (int64_t j = 0; j < n; ++j) own[j] = counts[own[j]];
    }
    width = std::max<int64_t>(1, std::min(k, o.panel_classes));
    // Of few classes as many samples as have their vectors within a tile's memory.
    const int64_t wide = std::max(width, std::min(dim, o.panel_classes));
    height = std::max<int64_t>(1, std::min(n, std::max(o.min_block, o.tile_elements / wide)));
  }

  at::Tensor of_samples(const at::Tensor& x) const { return samples ? x.index_select(0, *samples) : x; }
  at::Tensor of_classes(const at::Tensor& x) const { return classes ? x.index_select(0, *classes) : x; }
  at::Tensor of_panel(const at::Tensor& x, int64_t c, int64_t cols) const {
    return classes ? x.index_select(0, classes->narrow(0, c, cols)) : x.narrow(0, c, cols);
  }

  // body(first class, classes) for each panel, body(first sample, samples) for each block.
  template <typename Body>
  void panels(const Body& body) const {
    for (int64_t c = 0; c < k; c += width) body(c, std::min(width, k - c));
  }
  template <typename Body>
  void blocks(const Body& body) const {
    for (int64_t j = 0; j < n; j += height) body(j, std::min(height, n - j));
  }

  // The column of each sample's own class in a tile, -1 where that is in another.
  at::Tensor own(int64_t c, int64_t cols, int64_t j, int64_t rows) const {
    at::Tensor block = labels.narrow(0, j, rows);
    if (cols == k) return block;
    at::Tensor found = at::empty({rows}, at::kLong);
    const int64_t* const label = block.data_ptr<int64_t>();
    int64_t* const column = found.data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; ++r) column[r] = label[r] >= c && label[r] < c + cols ? label[r] - c : -1;
    return found;
  }

  // A tile's place in `kept`, where they lie one after the other; none past its end.
  std::optional<at::Tensor> kept_tile(const at::Tensor& kept, int64_t c, int64_t cols, int64_t j, int64_t rows) const {
    const int64_t start = n * c + j * cols;
    if (start + rows * cols > kept.numel()) return std::nullopt;
    return matrix_at(kept, start, rows, cols);
  }
  bool keeps_all(const at::Tensor& kept) const { return n * k <= kept.numel(); }

  // Room for a tile that is not kept, where there is one.
  at::Tensor memory(const at::Tensor& kept) const { return reusable(keeps_all(kept) ? 0 : height * width); }
};

// Of a vector that may not be there.
std::optional<at::Tensor> part(const std::optional<at::Tensor>& x, int64_t first, int64_t length) {
  return x ? std::optional(x->narrow(0, first, length)) : std::nullopt;
}

at::Tensor times(const at::Tensor& x, double scale, const std::optional<at::Tensor>& factors) {
  at::Tensor scaled = x.mul(scale);
  return factors ? scaled.mul_(*factors) : scaled;
}

// Whether the weights of exp(s) can scale the operands of the products in place of the exponentials, as `_folded` of
// blockwise.py says; what positives add is then divided by them.
bool fold(const Walk& t, bool rows, const at::Tensor& weights, const at::Tensor& inv, const at::Tensor& positives) {
  const float *const weight = weights.data_ptr<float>(), *const inverse = inv.data_ptr<float>();
  for (int64_t i = 0; i < weights.numel(); ++i) {
    const float scale = std::abs(weight[i] * inverse[i]);
    const bool extreme = scale < kMinFoldedScale || scale > kMaxFoldedScale;
    if (extreme && weight[i] != 0 && inverse[i] != 0) return false;
  }
  const int64_t* const label = t.labels.data_ptr<int64_t>();
  float* const positive = positives.data_ptr<float>();
  const auto own = [&](int64_t j) { return weight[rows ? label[j] : j]; };
  for (int64_t j = 0; j < t.n; ++j) {
    if (own(j) == 0 && positive[j] != 0) return false;
  }
  for (int64_t j = 0; j < t.n; ++j) positive[j] = own(j) == 0 ? 0 : positive[j] / own(j);
  return true;
}

// Adds each sample's positive to its own entry of a tile, or puts it there. Only while it lives, if the tile is `kept`
// for other walks over the graph, and then for one thread at a time.
class Joined {
 public:
  Joined(const at::Tensor& g, const at::Tensor& own, const float* positives, bool replace, bool kept)
      : g_(g), own_(own), before_(kept ? g.size(0) : 0) {
    if (kept) alone_ = std::unique_lock(kept_in_use);
    each([&](int64_t r, float& entry) {
      if (kept) before_[r] = entry;
      entry = replace ? positives[r] : entry + positives[r];
    });
  }
  ~Joined() {
    if (!before_.empty()) each([&](int64_t r, float& entry) { entry = before_[r]; });
  }
  Joined(const Joined&) = delete;

 private:
  template <typename Body>
  void each(const Body& body) const {
    const int64_t rows = g_.size(0), cols = g_.size(1);
    const int64_t* const column = own_.data_ptr<int64_t>();
    float* const entries = g_.data_ptr<float>();
    for (int64_t r = 0; r < rows; ++r) {
      if (column[r] >= 0) body(r, entries[r * cols + column[r]]);
    }
  }

  const at::Tensor g_, own_;
  std::vector<float> before_;
  std::unique_lock<std::mutex> alone_;
};

}  // namespace

LossAndSaved prototype_loss(const at::Tensor& features, const at::Tensor& prototypes, const at::Tensor& labels,
                            const std::optional<at::Tensor>& weight, const PrototypeLoss& o, bool zero_empty, bool mean,
                            int64_t room) {
  const Plainly plainly;
  const int64_t all_samples = features.size(0), all_classes = prototypes.size(0), dim = features.size(1);
  const Walk t(labels, all_classes, dim, o);
  const at::Tensor inv_features = inverse_norms("features", features);
  const at::Tensor inv_prototypes = inverse_norms("prototypes", prototypes);
  const at::Tensor x = t.of_samples(features), inv_x = t.of_samples(inv_features);
  const at::Tensor factors = t.of_classes(inv_prototypes).mul(o.inv_temperature);

  const at::Tensor positives = at::zeros({t.n}, at::kFloat);
  std::optional<at::Tensor> row_sums, col_sums;  // of exp(s), where they are asked for
  if (o.rows) row_sums = at::zeros({t.k}, at::kDouble);
  if (o.cols) col_sums = at::zeros({t.n}, at::kDouble);
  const at::Tensor kept = reusable(room), memory = t.memory(kept), unit = reusable(t.width * dim);
  int64_t used = 0;
  t.panels([&](int64_t c, int64_t cols) {
    const at::Tensor w = matrix_at(unit, 0, cols, dim);
    scale_rows(t.of_panel(prototypes, c, cols), factors.narrow(0, c, cols), w);
    t.blocks([&](int64_t j, int64_t rows) {
      const std::optional<at::Tensor> place = t.kept_tile(kept, c, cols, j, rows);
      if (place) used += rows * cols;
      const at::Tensor s = place ? *place : matrix_at(memory, 0, rows, cols);
      product(x.narrow(0, j, rows), w.t(), s, false);
      // The tile's rows are samples, each with its sum over the classes, and its columns are classes.
      exponentiate(s, inv_x.narrow(0, j, rows), t.own(c, cols, j, rows), positives.narrow(0, j, rows), o.exclude_own,
                   part(col_sums, j, rows), part(row_sums, c, cols));
    });
  });
  kept.narrow(0, used, room - used).zero_();

  // The loss and its gradients: O(N + K), and sums as they are, since exponentials have no shift.
  const double nothing = -std::numeric_limits<double>::infinity();
  const at::Tensor wide = at::empty({0}, at::kDouble);
  const at::Tensor row_lse = wide.new_full({o.rows ? all_classes : 0}, nothing), grad_row = at::zeros_like(row_lse);
  const at::Tensor col_lse = wide.new_full({o.cols ? all_samples : 0}, nothing), grad_col = at::zeros_like(col_lse);
  const at::Tensor all_positives = wide.new_zeros({all_samples}), grad_pos = at::zeros_like(all_positives);
  const int64_t* const own = t.labels.data_ptr<int64_t>();
  const int64_t* const sample = t.samples ? t.samples->data_ptr<int64_t>() : nullptr;
  const int64_t* const present = t.classes ? t.classes->data_ptr<int64_t>() : nullptr;
  const double *const row_sum = data<double>(row_sums), *const col_sum = data<double>(col_sums);
  // In units of the largest: the backward weighs exponentials in float32, where small ones would underflow.
  double largest = weight ? weight->max().item<double>() : 1.0;
  if (largest == 0) largest = 1.0;
  const at::Tensor class_weights = weight ? weight->to(at::kDouble).div(largest) : wide;
  std::vector<double> lse_of_class(o.rows ? t.k : 0);
  for (int64_t c = 0; o.rows && c < t.k; ++c) {
    lse_of_class[c] = row_lse.data_ptr<double>()[present ? present[c] : c] = std::log(row_sum[c]);
  }
  double total = 0, total_weight = 0;
  for (int64_t i = 0; i < t.n; ++i) {
    const int64_t j = sample ? sample[i] : i, c = present ? present[own[i]] : own[i];
    const double a = weight ? class_weights.data_ptr<double>()[c] : 1.0, positive = positives.data_ptr<float>()[i];
    const double in_row = o.rows ? row_sum[own[i]] : 0, in_col = o.cols ? col_sum[i] : 0;
    const bool empty = in_row + in_col == 0;
    const double lse = o.cols ? std::log(in_row + in_col) : lse_of_class[own[i]];
    all_positives.data_ptr<double>()[j] = positive;
    total_weight += a;
    if (o.cols) col_lse.data_ptr<double>()[j] = o.rows ? std::log(in_col) : lse;
    if (empty && zero_empty) continue;
    total -= a * positive;
    grad_pos.data_ptr<double>()[j] = -a;
    if (empty) continue;
    total += a * lse;
    if (o.cols) grad_col.data_ptr<double>()[j] = a * in_col / (in_row + in_col);
    if (o.rows) grad_row.data_ptr<double>()[c] += a * in_row / (in_row + in_col);
  }
  const double divisor = mean && total_weight > 0 ? total_weight : 1 / largest;
  return {at::scalar_tensor(total / divisor, at::kFloat), row_lse, col_lse, all_positives, inv_features, inv_prototypes, kept,
          grad_row, grad_col, grad_pos, at::scalar_tensor(divisor, at::kDouble)};
}

std::tuple<at::Tensor, at::Tensor, double> prototype_loss_backward(
    double factor, const at::Tensor& features, const at::Tensor& prototypes, const at::Tensor& labels,
    const at::Tensor& row_lse, const at::Tensor& col_lse, const at::Tensor& inv_features,
    const at::Tensor& inv_prototypes, const at::Tensor& kept, const at::Tensor& grad_row, const at::Tensor& grad_col,
    const at::Tensor& grad_pos, const PrototypeLoss& o, bool wants_features, bool wants_prototypes) {
  const Plainly plainly;
  const int64_t dim = features.size(1);
  const Walk t(labels, prototypes.size(0), dim, o);
  const at::Tensor x = t.of_samples(features), inv_x = t.of_samples(inv_features), inv_w = t.of_classes(inv_prototypes);
  const at::Tensor positives = t.of_samples(grad_pos).to(at::kFloat);
  std::optional<at::Tensor> of_class, of_sample, folded_class, folded_sample;
  if (o.rows) of_class = weights(t.of_classes(row_lse), t.of_classes(grad_row));
  if (o.cols) of_sample = weights(t.of_samples(col_lse), t.of_samples(grad_col));
  const bool is_one_sided = o.rows != o.cols;
  const bool folded = t.keeps_all(kept) && is_one_sided &&
                      fold(t, o.rows, o.rows ? *of_class : *of_sample, o.rows ? inv_w : inv_x, positives);
  if (folded) (o.rows ? folded_class : folded_sample) = o.rows ? of_class : of_sample;

  const at::Tensor outer_x = times(inv_x, 1.0, folded_sample);
  const at::Tensor outer_w = times(inv_w, o.inv_temperature, folded_class);
  const at::Tensor none = at::empty({0}, at::kFloat);
  const at::Tensor grad_x = wants_features ? reusable_matrix(t.n, dim) : none;
  const at::Tensor grad_prototypes = wants_prototypes ? reusable_matrix(prototypes.size(0), dim) : none;
  if (wants_prototypes && (t.classes || t.n == 0)) grad_prototypes.zero_();
  const at::Tensor memory = reusable(folded ? 0 : t.height * t.width);
  const at::Tensor unit = reusable(t.width * dim);
  const at::Tensor units = reusable_matrix(wants_prototypes ? t.height : 0, dim);
  double logit_grad_sum = 0;
  t.panels([&](int64_t c, int64_t cols) {
    const std::optional<at::Tensor> index = part(t.classes, c, cols);
    const at::Tensor y = t.of_panel(prototypes, c, cols);
    const at::Tensor w = matrix_at(unit, 0, cols, dim);
    scale_rows(y, outer_w.narrow(0, c, cols), w);
    at::Tensor grad_w;
    if (wants_prototypes) grad_w = index ? at::empty({cols, dim}, at::kFloat) : grad_prototypes.narrow(0, c, cols);
    t.blocks([&](int64_t j, int64_t rows) {
      const at::Tensor x_block = x.narrow(0, j, rows), own = t.own(c, cols, j, rows);
      const std::optional<at::Tensor> e = t.kept_tile(kept, c, cols, j, rows);
      const at::Tensor g = folded ? *e : matrix_at(memory, 0, rows, cols);
      if (!folded) {
        if (!e) product(x_block, w.t(), g, false);
        weigh(e ? *e : g, inv_x.narrow(0, j, rows), e.has_value(), part(of_sample, j, rows), part(of_class, c, cols), g);
      }
      // Positives join in before the products: added to them they would leave the rounding of both behind.
      const Joined joined(g, own, positives.data_ptr<float>() + j, o.exclude_own, folded);
      if (wants_features) {
        const at::Tensor grad = grad_x.narrow(0, j, rows);
        product(g, w, grad, c > 0);
        if (c + cols == t.k) {
          logit_grad_sum +=
              through_norm(grad, x_block, inv_x.narrow(0, j, rows), outer_x.narrow(0, j, rows), true, factor);
        }
      }
      if (wants_prototypes) {
        const at::Tensor u = units.narrow(0, 0, rows);
        scale_rows(x_block, outer_x.narrow(0, j, rows), u);
        product(g.t(), u, grad_w, j > 0);
      }
    });
    if (!wants_prototypes || t.n == 0) return;
    through_norm(grad_w, y, inv_w.narrow(0, c, cols), outer_w.narrow(0, c, cols), true, factor);
    if (index) grad_prototypes.index_copy_(0, *index, grad_w);
  });
  if (!wants_features || !t.samples) return {grad_x, grad_prototypes, logit_grad_sum};
  return {at::zeros_like(features).index_copy_(0, *t.samples, grad_x), grad_prototypes, logit_grad_sum};
}

}  // namespace hypercontrast
