// A thread's part of W: 16 bytes at a time of two rows, read, updated and written where they lie.
#pragma once

#include "lowrank_traits.cuh"

namespace subzero::cuda {

// ---- decay W + sum, rounded once

// decay w + sum. decay_rest is 0 but for a decay that fp32 cannot hold; 0 times an infinite w is
// none of it.
__device__ __forceinline__ float added_to(float w, float sum, const UpdateCall& call) {
  const float rest = call.decay_rest == 0.0f ? sum : fma_(call.decay_rest, w, sum);
  return fma_(call.decay, w, rest);
}

// 16 bytes of W with the sums added. `words` null: to nearest.
template <class W>
__device__ __forceinline__ Bytes16 updated(const Bytes16& old, const float* sum,
                                           const UpdateCall& call, const uint32_t* words) {
  Bytes16 x;
  if constexpr (sizeof(W) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.word[i] = float_bits(added_to(bits_float(old.word[i]), sum[i], call));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 w = unpack(W{}, old.word[i]);
      const float low = fma_(call.decay, w.x, sum[2 * i]);  // decay_rest is for fp32
      const float high = fma_(call.decay, w.y, sum[2 * i + 1]);
      x.word[i] = words == nullptr ? round_pair(W{}, low, high)
                                   : round_pair(W{}, low, high, words[2 * i], words[2 * i + 1]);
    }
  }
  return x;
}

// Rows q and q + 8 of a warp's 16 and kSpans times 16 bytes of each, which begin at 16 bytes; tile
// after tile, `step` rows apart. W comes through shared memory, where a thread has slots of its
// own: registers would hold fewer bytes under way, and the compiler waits for all loads of a loop
// where it turns. What lies outside of the matrix is read as zero and not written.
template <class Traits>
class WeightRows {
  using W = typename Traits::W;
  static constexpr int kVec = Traits::kVec;

 public:
  // `row` and `column` are the thread's first.
  __device__ __forceinline__ WeightRows(const UpdateItem& item, int64_t row, int64_t column,
                                        int64_t step, int tiles, unsigned char* slots)
      : item_(item),
        slots_(slots + 16 * threadIdx.x),
        step_(step),
        ahead_tiles_(tiles),
        tiles_(tiles) {
    ahead_ = now_ = static_cast<W*>(item.w) + row * item.w_stride + column;
    last_rows_ = static_cast<int>(min(item.rows - row - (tiles - 1) * step, int64_t{16}));
    columns_ = static_cast<int>(min(item.columns - column, int64_t{Traits::kColumns}));
    element_ = item.first + row * item.columns + column;
  }

  // Starts to fetch the next tile that has not been fetched.
  __device__ __forceinline__ void fetch(int stage) {
    const int rows = rows_of(ahead_tiles_);
#pragma unroll
    for (int s = 0; s < Traits::kSpans; ++s)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool real = 8 * h < rows && s * Traits::kSpan < columns_;
        const W* const from = ahead_ + 8 * h * item_.w_stride + s * Traits::kSpan;
        copy_async<Traits::kLoad == LoadHint::fetch256>(shared_address(slot(stage, s, h)),
                                                        real ? from : item_.w, real);
      }
    ahead_ += step_ * item_.w_stride;
    --ahead_tiles_;
  }

  __device__ __forceinline__ Bytes16 load(int stage, int s, int h) const {
    return *reinterpret_cast<const Bytes16*>(slot(stage, s, h));
  }

  __device__ __forceinline__ void store(int s, int h, const Bytes16& x) const {
    if (8 * h < rows_of(tiles_) && s * Traits::kSpan < columns_)
      store16<Traits::kStore>(now_ + 8 * h * item_.w_stride + s * Traits::kSpan, x);
  }

  // The words of kVec neighbouring elements, of which the first is a block's first.
  __device__ __forceinline__ void words(const NoiseSource& source, int s, int h,
                                        uint32_t (&out)[kVec]) const {
    const auto block =
        static_cast<uint64_t>(element_ + 8 * h * item_.columns + s * Traits::kSpan) / 4;
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const Words words = block_words(source, block + i / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = words.w[j];
    }
  }

  __device__ __forceinline__ void next() {
    now_ += step_ * item_.w_stride;
    element_ += step_ * item_.columns;
    --tiles_;
  }

 private:
  __device__ __forceinline__ unsigned char* slot(int stage, int s, int h) const {
    return slots_ + ((stage * Traits::kSpans + s) * 2 + h) * 16 * Traits::kThreads;
  }

  // From this thread's first on, with so many tiles to go.
  __device__ __forceinline__ int rows_of(int tiles) const {
    return tiles > 1 ? 16 : tiles == 1 ? last_rows_ : 0;
  }

  const UpdateItem& item_;
  unsigned char* slots_;
  int64_t step_;
  W *ahead_, *now_;
  int64_t element_;  // row-major index in the whole matrix
  int ahead_tiles_, tiles_, last_rows_, columns_;
};

// The same for a W of any alignment, whose rows may also be cut where those of (m', n') are not.
// Element by element, and small: speed is for the others.
template <class Traits>
class WeightElements {
  using W = typename Traits::W;
  static constexpr int kVec = Traits::kVec;

 public:
  __device__ __forceinline__ WeightElements(const UpdateItem& item, int64_t row, int64_t column,
                                            int64_t step, int, unsigned char*)
      : item_(item), row_(row), column_(column), step_(step) {}

  // W = decay W + sum for kVec neighbours, the sums `added`.
  __device__ __forceinline__ void update(int tile, int s, int h, const float (&added)[kVec],
                                         const UpdateCall& call, const NoiseSource& source) const {
    const int64_t row = row_ + tile * step_ + 8 * h;
    const int64_t column = column_ + s * Traits::kSpan;
    if (row >= item_.rows || column >= item_.columns) return;
    const int64_t count = item_.columns - column;
    const int64_t inside = row * item_.columns + column, element = item_.first + inside;
    W* at = static_cast<W*>(item_.w);
    int64_t left = kVec;  // in this row of W
    if (item_.w_columns == 0) {
      at += row * item_.w_stride + column;
    } else {
      // All rows are counted from W's first: `w` is not moved to a part's first row.
      const int64_t place = element % item_.w_columns;
      at += element / item_.w_columns * item_.w_stride + place;
      left = item_.w_columns - place;
    }
    W* place[kVec];
    W old[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      place[i] = at;
      old[i] = i < count ? *at : W{};
      ++at;
      if (--left == 0) at += item_.w_stride - item_.w_columns, left = item_.w_columns;
    }
    constexpr int kBlocks = kVec / 4 + 1;
    uint32_t words[4 * kBlocks] = {};
    if (call.stochastic && sizeof(W) == 2) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const Words block = block_words(source, static_cast<uint64_t>(element) / 4 + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) words[4 * i + j] = block.w[j];
      }
    }
    const int skip = static_cast<int>(element % 4);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float value = added_to(to_float(old[i]), added[i], call);
      uint32_t word = words[i];
#pragma unroll
      for (int j = 1; j < 4; ++j) word = skip == j ? words[i + j] : word;
      if (call.stochastic)
        round_stochastic(value, word, old[i]);
      else
        round_nearest(value, old[i]);
      if (i < count) *place[i] = old[i];
    }
  }

 private:
  const UpdateItem& item_;
  int64_t row_, column_, step_;
};

}  // namespace subzero::cuda
