// W in memory: tiles that are read, updated and written, and how elements are rounded.
#pragma once

#include "lowrank_traits.cuh"
#include "noise.cuh"

namespace subzero::cuda {

// ---- decay W + sum, rounded once

// decay w + sum. decay_rest is 0 but for a decay that fp32 cannot hold; 0 times an infinite w is
// none of it.
__device__ __forceinline__ float added_to(float w, float sum, const UpdateCall& call) {
  const float rest = call.decay_rest == 0.0f ? sum : fma_(call.decay_rest, w, sum);
  return fma_(call.decay, w, rest);
}

// 16 bytes of W with the sums added, to nearest.
template <class W>
__device__ __forceinline__ Bytes16 updated(const Bytes16& old, const float* sum,
                                           const UpdateCall& call) {
  Bytes16 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(W) == 4) {
      x.word[i] = float_bits(added_to(bits_float(old.word[i]), sum[i], call));
    } else {
      const float2 w = unpack(W{}, old.word[i]);  // decay_rest is for fp32
      x.word[i] =
          round_pair(W{}, fma_(call.decay, w.x, sum[2 * i]), fma_(call.decay, w.y, sum[2 * i + 1]));
    }
  }
  return x;
}

// The same by words.
template <class W>
__device__ __forceinline__ Bytes16 updated(const Bytes16& old, const float* sum,
                                           const UpdateCall& call, const uint32_t (&words)[8]) {
  Bytes16 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 w = unpack(W{}, old.word[i]);
    x.word[i] = round_pair(W{}, fma_(call.decay, w.x, sum[2 * i]),
                           fma_(call.decay, w.y, sum[2 * i + 1]), words[2 * i], words[2 * i + 1]);
  }
  return x;
}

// The tiles of a thread block, `step` rows apart, whose rows begin at 16 bytes. They pass through
// shared memory both ways, row by row: DRAM likes rows as long as they get, the tensor cores want
// rows q and q + 8. What lies outside of the matrix is read as zero and not written.
template <class Traits>
class WeightTiles {
  using W = typename Traits::W;
  static constexpr int kVec = Traits::kVec;
  static constexpr int kPieces = 2 * Traits::kSpans;  // of 16 bytes, to a thread

 public:
  // `row` and `column` are the block's first, `below` is the base-2 logarithm of a tile's strips.
  __device__ __forceinline__ WeightTiles(const UpdateItem& item, int64_t row, int64_t column,
                                         int below, int64_t step, int tiles, unsigned char* room)
      : item_(item), room_(room), ahead_tiles_(tiles), tiles_(tiles) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    // Memory: piece thread + i kThreads of a tile, row by row.
    pieces_ = 4 * Traits::kSpans << item.across;
    my_row_ = thread / pieces_;
    const int piece = thread % pieces_;
    inside_ = column + piece * kVec < item.columns;
    rows_ = 16 << below;
    last_rows_ = static_cast<int>(min(item.rows - row - (tiles - 1) * step, int64_t{rows_}));
    ahead_ = now_ =
        static_cast<W*>(item.w) + (row + my_row_) * item.w_stride + column + piece * kVec;
    stride_ = step * item.w_stride;
    apart_ = Traits::kThreads / pieces_;
    my_slot_ = slot(my_row_, piece);
    // Tensor cores: row q of the warp's strip, 4 pieces to a span.
    fragment_ = slot((warp >> item.across) * 16 + lane / 4,
                     (warp & ((1 << item.across) - 1)) * 4 * Traits::kSpans + lane % 4);
  }

  // Starts to fetch the next tile that has not been fetched.
  __device__ __forceinline__ void fetch(int stage) {
    const int rows = rows_of(ahead_tiles_);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool real = inside_ && my_row_ + i * apart_ < rows;
      const W* const from = ahead_ + i * apart_ * item_.w_stride;
      copy_async(shared_address(room_ + stage * Traits::kTileBytes + mine(i)),
                 real ? from : item_.w, real);
    }
    ahead_ += stride_;
    --ahead_tiles_;
  }

  // 16 bytes of row q or q + 8 (h) of a span.
  __device__ __forceinline__ Bytes16& at(int stage, int s, int h) const {
    return *reinterpret_cast<Bytes16*>(room_ + stage * Traits::kTileBytes + (fragment_ ^ 64 * s) +
                                       8 * h * 16 * pieces_);
  }

  // Writes the tile; then the next is the current one.
  __device__ __forceinline__ void store(int stage) {
    const int rows = rows_of(tiles_);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (inside_ && my_row_ + i * apart_ < rows)
        store16<Traits::kStore>(
            now_ + i * apart_ * item_.w_stride,
            *reinterpret_cast<const Bytes16*>(room_ + stage * Traits::kTileBytes + mine(i)));
    now_ += stride_;
    --tiles_;
  }

 private:
  // Where a piece lies in a tile. Of two neighbouring rows one has each two halves of 128 bytes
  // exchanged: eight threads that read four pieces of both use all banks.
  __device__ __forceinline__ int slot(int row, int piece) const {
    const int swap = pieces_ > 4 ? row % 2 * 4 : 0;
    return 16 * (row * pieces_ + (piece ^ swap));
  }
  // The rows of a thread's pieces are all odd or all even.
  __device__ __forceinline__ int mine(int i) const { return my_slot_ + i * apart_ * 16 * pieces_; }
  __device__ __forceinline__ int rows_of(int tiles) const {
    return tiles > 1 ? rows_ : tiles == 1 ? last_rows_ : 0;
  }

  const UpdateItem& item_;
  unsigned char* room_;
  W *ahead_, *now_;
  int64_t stride_;
  int ahead_tiles_, tiles_, rows_, last_rows_;
  int pieces_, apart_, my_row_, my_slot_, fragment_;
  bool inside_;
};

// The words that round a thread's fragments, tile after tile.
template <class Traits>
class FragmentWords {
  static constexpr int kVec = Traits::kVec;

 public:
  // `element` is the row-major index of the thread's first element, `step` that to the next tile.
  __device__ __forceinline__ FragmentWords(const NoiseSource& source, int64_t element,
                                           int64_t columns, int64_t step)
      : source_(source),
        element_(element),
        columns_(columns),
        step_(step),
        blocks_(keys(), source.stream, source.draw, high_of(element)),
        high_(high_of(element)) {}

  // Of kVec neighbouring elements, of which the first is a block's first.
  __device__ __forceinline__ void get(int s, int h, uint32_t (&out)[kVec]) {
    const int64_t element = element_ + 8 * h * columns_ + s * Traits::kSpan;
    if (high_of(element) != high_) {
      high_ = high_of(element);
      blocks_ = Blocks(keys(), source_.stream, source_.draw, high_);
    }
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const Words words = blocks_.words(keys(), static_cast<uint32_t>(element / 4) + i / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = words.w[j];
    }
  }

  __device__ __forceinline__ void next() { element_ += step_; }

 private:
  static __device__ __forceinline__ uint32_t high_of(int64_t element) {
    return static_cast<uint32_t>(static_cast<uint64_t>(element) >> 34);
  }
  __device__ __forceinline__ RoundKeys keys() const {
    return RoundKeys(static_cast<uint64_t>(source_.key[1]) << 32 | source_.key[0]);
  }

  NoiseSource source_;
  int64_t element_, columns_, step_;
  Blocks blocks_;
  uint32_t high_;
};

// W of any alignment, whose rows may also be cut where those of (m', n') are not: read, updated and
// written element by element. It is small; speed is for the others.
template <class Traits>
class WeightElements {
  using W = typename Traits::W;
  static constexpr int kVec = Traits::kVec;

 public:
  __device__ __forceinline__ WeightElements(const UpdateItem& item, int64_t row, int64_t column,
                                            int64_t step)
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
