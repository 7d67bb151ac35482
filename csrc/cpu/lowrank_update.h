// W = decay W + U C V^T for many matrices in one launch and one pass over each W: what perturb_ and
// fold_ share. They differ in where the core C (r x r) comes from.
#pragma once

#include "isa.h"

namespace subzero::cpu::SUBZERO_ISA {

struct Update {
  LowRank item;
  double decay;
  bool stochastic;
  NoiseSource rounding;  // of stochastic rounding

  int64_t rows() const { return item.u.rows; }
  int64_t columns() const { return item.v.rows; }
  int64_t rank() const { return item.u.columns; }
};

// Writes elements first .. first + count (row-major) of the core of updates[item]. `first` is a
// multiple of kCorePart, and count at most that.
using FillCore = void (*)(const void* context, int64_t item, int64_t first, int64_t count,
                          float* values);
constexpr int64_t kCorePart = 1024;

Status update_many(const Update* updates, int64_t count, int threads, FillCore fill_core,
                   const void* context);

}  // namespace subzero::cpu::SUBZERO_ISA
