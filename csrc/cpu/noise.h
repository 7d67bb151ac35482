// Runs of words and normals. The loops below hold philox.h's scalar definitions; the compiler turns
// each into vector code, 16 blocks at a time under AVX-512.
#pragma once

#include "isa.h"

namespace subzero::cpu::SUBZERO_ISA {

constexpr int kBatchBlocks = 64;
constexpr int kBatch = 4 * kBatchBlocks;
constexpr int kGroupBlocks = 16;

// Whole groups of blocks, up to a batch, from `block`: at least `count` elements.
static inline void batch_words(const NoiseSource& source, uint64_t block, uint32_t* out,
                               int64_t count = kBatch) {
  for (int64_t at = 0; at < count; at += 4 * kGroupBlocks, block += kGroupBlocks)
    for (int i = 0; i < kGroupBlocks; ++i) {
      const Words words = block_words(source, block + static_cast<uint64_t>(i));
      for (int j = 0; j < 4; ++j) out[at + 4 * i + j] = words.w[j];
    }
}

static inline void batch_normals(const NoiseSource& source, uint64_t block, float* out,
                                 int64_t count = kBatch) {
  for (int64_t at = 0; at < count; at += 4 * kGroupBlocks, block += kGroupBlocks)
    for (int i = 0; i < kGroupBlocks; ++i) {
      const Normals normals = block_normals(source, block + static_cast<uint64_t>(i));
      for (int j = 0; j < 4; ++j) out[at + 4 * i + j] = normals.z[j];
    }
}

// The normals of elements first .. first + count, a batch at a time: f(offset from first, z,
// count).
template <class F>
static inline void for_each_batch(const NoiseSource& source, int64_t first, int64_t count, F&& f) {
  for (int64_t at = 0; at < count;) {
    const int64_t skip = (first + at) % 4, taken = least(kBatch - skip, count - at);
    float z[kBatch];
    batch_normals(source, static_cast<uint64_t>(first + at) / 4, z, skip + taken);
    f(at, z + skip, taken);
    at += taken;
  }
}

// The words of elements first .. first + count.
static inline void fill_words(const NoiseSource& source, int64_t first, int64_t count,
                              uint32_t* out) {
  while (count > 0) {
    const int64_t skip = first % 4, taken = least(count, kBatch - skip);
    uint32_t batch[kBatch];
    batch_words(source, static_cast<uint64_t>(first) / 4, batch, skip + taken);
    memcpy(out, batch + skip, static_cast<size_t>(taken) * sizeof *out);
    first += taken, out += taken, count -= taken;
  }
}

// Elements first .. first + count of a row-strided tensor as runs of contiguous memory:
// f(pointer, first element, count).
template <class T, class F>
static inline void for_each_run(const Matrix& w, int64_t first, int64_t count, F&& f) {
  T* const data = static_cast<T*>(w.data);
  if (w.stride == w.columns || w.rows == 1) return f(data + first, first, count);
  while (count > 0) {
    const int64_t row = first / w.columns, column = first % w.columns;
    const int64_t run = least(count, w.columns - column);
    f(data + row * w.stride + column, first, run);
    first += run, count -= run;
  }
}

}  // namespace subzero::cpu::SUBZERO_ISA
