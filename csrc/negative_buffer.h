// The host side of the negative buffer: the three functions of hypercontrast/buffer.py's Python twin, one call each.
// They trust their arguments: NegativeBuffer checks them.
//
// A buffer's rows come as two views of its memory, features [rows, D] in its dtype and tails [rows, 2] int64, which
// hold (label, header).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace hypercontrast {

// To raise, here and in hypercontrast/_extension.py, when a function of the extension or a row's layout changes: one
// left over from an older build is then not used.
constexpr int kRevision = 8;

// Write samples [n, D] with labels [n] into the first n rows; the others become absent.
void pack(const at::Tensor& row_features, const at::Tensor& row_tails, const at::Tensor& features,
          const at::Tensor& labels, int64_t header, bool normalize);

// pack into this rank's rows, `mine` as bytes, and start the collective that fills `everyone`, all ranks' rows.
c10::intrusive_ptr<c10d::Work> gather(at::Tensor everyone, at::Tensor mine, const at::Tensor& row_features,
                                      const at::Tensor& row_tails, const at::Tensor& features,
                                      const at::Tensor& labels, int64_t header, bool normalize,
                                      const c10::intrusive_ptr<c10d::ProcessGroup>& group);

// pack the newest samples into a ring of rows, from `cursor` on and round its end. Returns the next cursor.
int64_t push(const at::Tensor& ring_features, const at::Tensor& ring_tails, int64_t cursor, const at::Tensor& features,
             const at::Tensor& labels, int64_t header, bool normalize);

}  // namespace hypercontrast
