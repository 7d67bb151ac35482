// The bases of an update: tiles of V in shared memory, rows of U in registers.
#pragma once

#include <type_traits>

#include "lowrank_update.cuh"
#include "mma.cuh"

namespace subzero::cuda {

// Numbers from `from` on, of which the first `count` exist; the others are zero.
template <class T, int kCount>
__device__ __forceinline__ void load_some(const T* from, int count, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
}

// V^T for one tile of columns of W, in shared memory: a row of kPitch 16-bit numbers for each
// column, kParts times where it takes several to hold V. Columns are in the order in which
// fragments want them (Traits::place), and what lies outside of V is zero. Rows are an odd number
// of 16 bytes apart, so eight of them lie in different banks.
template <class Traits>
class BasisTile {
  using B = typename Traits::B;
  // A thread takes the same 8 numbers of every kApart-th column.
  static constexpr int kPiecesOfRow = Traits::kRank / 8;
  static constexpr int kApart = Traits::kThreads / kPiecesOfRow;
  static constexpr int kEach = (Traits::kTileColumns + kApart - 1) / kApart;
  static_assert(Traits::kThreads % kPiecesOfRow == 0, "threads take parts of several rows");

 public:
  __device__ BasisTile(const UpdateItem& item, int64_t column, int columns)
      : item_(item), columns_(columns) {
    const int size = Traits::kWide && item.v_wide ? 4 : 2;
    const auto address = reinterpret_cast<uintptr_t>(item.v);
    whole_pieces_ = item.rank % 8 == 0 && item.v_stride * size % 16 == 0 && address % 16 == 0;
    offset_ = (column + first_column()) * item.v_stride + at();
  }

  // Starts to fetch the tile `first` columns into the chunk; put() ends it.
  __device__ __forceinline__ void fetch(int first, uint16_t* tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int c = first_column() + i * kApart;
      if (Traits::kTileColumns % kApart != 0 && c >= Traits::kTileColumns) break;
      const bool real = first + c < columns_ && at() < item_.rank;
      const int64_t offset = offset_ + (first + i * kApart) * item_.v_stride;
      if constexpr (Traits::kWide) {
        const int count = real ? min(8, item_.rank - at()) : 0;
        if (item_.v_wide)
          fetch_wide(static_cast<const float*>(item_.v) + offset, count, held_[i]);
        else
          load_some(static_cast<const typename Traits::W*>(item_.v) + offset, count, held_[i]);
      } else {
        const B* const from = static_cast<const B*>(item_.v) + offset;
        uint16_t* const to = tile + row_of(i) * Traits::kPitch + at();
        if (whole_pieces_) {
          copy_async(shared_address(to), real ? from : item_.v, real);
        } else {
          const int count = real ? item_.rank - at() : 0;
#pragma unroll
          for (int j = 0; j < 8; ++j) to[j] = j < count ? from[j].bits : uint16_t{0};
        }
      }
    }
  }

  __device__ __forceinline__ void put(uint16_t* tile) {
    if constexpr (Traits::kWide) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (Traits::kTileColumns % kApart != 0 &&
            first_column() + i * kApart >= Traits::kTileColumns)
          break;
        uint32_t part[4][Traits::kV];
#pragma unroll
        for (int j = 0; j < 4; ++j) split(held_[i][2 * j], held_[i][2 * j + 1], part[j]);
#pragma unroll
        for (int p = 0; p < Traits::kV; ++p)
          *reinterpret_cast<uint4*>(tile + p * Traits::kPartNumbers + row_of(i) * Traits::kPitch +
                                    at()) =
              make_uint4(part[0][p], part[1][p], part[2][p], part[3][p]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int at() {
    return static_cast<int>(threadIdx.x) % kPiecesOfRow * 8;
  }
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) / kPiecesOfRow;
  }
  // The row of the tile for column first_column() + i kApart. `place` moves bits of a column to
  // other positions, so it is a sum over the bits, which do not overlap for a power of two.
  static __device__ __forceinline__ int row_of(int i) {
    if constexpr ((kApart & (kApart - 1)) == 0)
      return Traits::place(first_column()) + Traits::place(i * kApart);
    return Traits::place(first_column() + i * kApart);
  }

  __device__ __forceinline__ void fetch_wide(const float* from, int count, float (&out)[8]) {
    if (!whole_pieces_) return load_some(from, count, out);
    float4 low{}, high{};
    if (count > 0) {
      low = reinterpret_cast<const float4*>(from)[0];
      high = reinterpret_cast<const float4*>(from)[1];
    }
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  }

  const UpdateItem& item_;
  int64_t offset_;  // of this thread's first 8 numbers in V
  int columns_;
  bool whole_pieces_;
  float held_[Traits::kWide ? kEach : 1][8];
};

// Rows q and q + 8 of a warp's 16 rows of U, two neighbouring numbers at a time: what a register of
// fragment A holds of them. What lies outside of U is zero.
template <class Traits>
class BasisRows {
  using W = typename Traits::W;

 public:
  using Pair = std::conditional_t<Traits::kWide, float2, uint32_t>;

  __device__ BasisRows(const UpdateItem& item, int64_t row) : item_(item) {
    const bool wide = Traits::kWide && item.u_wide;
    const auto address = reinterpret_cast<uintptr_t>(item.u);
    whole_pairs_ = item.rank % 2 == 0 && item.u_stride % 2 == 0 && address % (wide ? 8 : 4) == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rank_[h] = row + 8 * h < item.rows ? item.rank : 0;
      offset_[h] = (row + 8 * h) * item.u_stride;
    }
  }

  __device__ __forceinline__ Pair load(int h, int column) const {
    const int count = rank_[h] - column;  // that exist; one of two only where they are not whole
    const int64_t offset = offset_[h] + column;
    if constexpr (Traits::kWide) {
      float pair[2] = {};
      if (!item_.u_wide) {
        load_some(static_cast<const W*>(item_.u) + offset, count, pair);
      } else {
        const float* const from = static_cast<const float*>(item_.u) + offset;
        if (!whole_pairs_)
          load_some(from, count, pair);
        else if (count > 0)
          return *reinterpret_cast<const float2*>(from);
      }
      return make_float2(pair[0], pair[1]);
    } else {
      const W* const from = static_cast<const W*>(item_.u) + offset;
      if (whole_pairs_) return count > 0 ? *reinterpret_cast<const uint32_t*>(from) : 0u;
      const uint32_t low = count > 0 ? from[0].bits : 0u, high = count > 1 ? from[1].bits : 0u;
      return high << 16 | low;
    }
  }

  static __device__ __forceinline__ void parts(const Pair& pair, uint32_t (&out)[Traits::kU]) {
    if constexpr (Traits::kWide) {
      split(pair.x, pair.y, out);
    } else if constexpr (std::is_same_v<W, bf16>) {
      out[0] = pair;
    } else {
      const float2 numbers = unpack_f16(pair);
      split(numbers.x, numbers.y, out);
    }
  }

 private:
  const UpdateItem& item_;
  int64_t offset_[2];
  int rank_[2];  // 0 for a row outside of U
  bool whole_pairs_;
};

}  // namespace subzero::cuda
