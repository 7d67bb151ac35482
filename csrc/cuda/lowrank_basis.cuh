// The bases of an update as operands of the tensor cores: V in its columns' order, rows of U.
#pragma once

#include "lowrank_traits.cuh"

namespace subzero::cuda {

// Numbers from `from` on, of which the first `count` exist; the others are zero.
template <class T, int kCount>
__device__ __forceinline__ void load_some(const T* from, int count, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <int kCount>
__device__ __forceinline__ void load_fours(const float* from, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
  }
}

// kRun 16-bit numbers, two to a word; in one access where they are `whole`.
template <int kRun, class T>
__device__ __forceinline__ void load_pairs16(const T* from, int count, bool whole,
                                             uint32_t (&out)[kRun / 2]) {
#pragma unroll
  for (int i = 0; i < kRun / 2; ++i) out[i] = 0u;
  if (!whole) {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i < count) out[i / 2] |= static_cast<uint32_t>(from[i].bits) << 16 * (i % 2);
  } else if (count > 0) {
    if constexpr (kRun == 8) {
      const uint4 run = *reinterpret_cast<const uint4*>(from);
      out[0] = run.x, out[1] = run.y, out[2] = run.z, out[3] = run.w;
    } else {
      const uint2 run = *reinterpret_cast<const uint2*>(from);
      out[0] = run.x, out[1] = run.y;
    }
  }
}

// V^T for a warp's columns, as operands B that stay with their thread: n-block j, step of 16 ranks.
// What lies outside of V is zero.
template <class Traits>
class Right {
  using W = typename Traits::W;
  using B = typename Traits::B;
  static constexpr int kRun = Traits::kRun;
  static constexpr int kCount = 4 * Traits::kGroups;  // n-blocks

 public:
  // `column` is the warp's first; `room` is shared memory, where registers are too few.
  __device__ __forceinline__ Right(const UpdateItem& item, int64_t column, void* room)
      : room_(static_cast<uint2*>(room) + threadIdx.x) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int size = Traits::kWide && item.v_wide ? 4 : 2;
    const auto address = reinterpret_cast<uintptr_t>(item.v);
    const bool whole = item.rank % kRun == 0 && item.v_stride * size % (kRun * 2) == 0 &&
                       address % (kRun * size < 16 ? 8 : 16) == 0;
    // The lane's column of n-block j (lowrank_traits.cuh).
    column += lane / 8 * Traits::kVec + lane / 4 % 2;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int64_t mine = column + j / Traits::kBlocks * Traits::kSpan + j % Traits::kBlocks * 2;
#pragma unroll
      for (int step = 0; step < Traits::kSteps; step += Traits::kSteps2) {
        const int first = 16 * step + lane % 4 * kRun;
        const int count = mine < item.columns ? item.rank - first : 0;
        load(item, mine * item.v_stride + first, count, whole, j, step);
      }
    }
  }

  __device__ __forceinline__ void get(int v, int j, int step, uint32_t& b0, uint32_t& b1) const {
    const int at = (v * kCount + j) * Traits::kSteps + step;
    if constexpr (Traits::kRightShared) {
      const uint2 pair = room_[at * Traits::kThreads];
      b0 = pair.x, b1 = pair.y;
    } else {
      b0 = word_[2 * at], b1 = word_[2 * at + 1];
    }
  }

 private:
  __device__ __forceinline__ void put(int v, int j, int step, uint32_t b0, uint32_t b1) {
    const int at = (v * kCount + j) * Traits::kSteps + step;
    if constexpr (Traits::kRightShared)
      room_[at * Traits::kThreads] = make_uint2(b0, b1);
    else
      word_[2 * at] = b0, word_[2 * at + 1] = b1;
  }

  // kRun numbers at `offset`, of which `count` exist: those of kRun / 4 steps.
  __device__ __forceinline__ void load(const UpdateItem& item, int64_t offset, int count,
                                       bool whole, int j, int step) {
    if constexpr (Traits::kWide) {
      float number[kRun] = {};
      if (!item.v_wide) {
        load_some(static_cast<const W*>(item.v) + offset, count, number);
      } else {
        const float* const from = static_cast<const float*>(item.v) + offset;
        if (!whole)
          load_some(from, count, number);
        else if (count > 0)
          load_fours(from, number);
      }
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        uint32_t low[Traits::kV], high[Traits::kV];
        split(number[i], number[i + 1], low);
        split(number[i + 2], number[i + 3], high);
#pragma unroll
        for (int v = 0; v < Traits::kV; ++v) put(v, j, step + i / 4, low[v], high[v]);
      }
    } else {
      uint32_t pair[kRun / 2];
      load_pairs16<kRun>(static_cast<const B*>(item.v) + offset, count, whole, pair);
#pragma unroll
      for (int i = 0; i < kRun; i += 4) put(0, j, step + i / 4, pair[i / 2], pair[i / 2 + 1]);
    }
  }

  uint2* room_;
  uint32_t word_[Traits::kRightShared ? 1 : Traits::kRightWords];
};

// Rows q and q + 8 of a warp's 16 rows of U, kRun neighbours at a time: what a lane's operands A of
// kRun / 4 steps hold of them. What lies outside of U is zero.
template <class Traits>
class BasisRows {
  using W = typename Traits::W;
  static constexpr int kRun = Traits::kRun;

 public:
  using Pair = std::conditional_t<Traits::kWide, float2, uint32_t>;

  __device__ __forceinline__ BasisRows(const UpdateItem& item, int64_t row) : item_(item) {
    const int size = Traits::kWide && item.u_wide ? 4 : 2;
    const auto address = reinterpret_cast<uintptr_t>(item.u);
    whole_ = item.rank % kRun == 0 && item.u_stride * size % (kRun * 2) == 0 &&
             address % (kRun * size < 16 ? 8 : 16) == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rank_[h] = row + 8 * h < item.rows ? item.rank : 0;
      offset_[h] = (row + 8 * h) * item.u_stride;
    }
  }

  // Row q or q + 8 (h), columns from `column` on.
  __device__ __forceinline__ void load(int h, int column, Pair (&out)[kRun / 2]) const {
    const int count = rank_[h] - column;
    const int64_t offset = offset_[h] + column;
    if constexpr (Traits::kWide) {
      float number[kRun] = {};
      if (!item_.u_wide) {
        load_some(static_cast<const W*>(item_.u) + offset, count, number);
      } else {
        const float* const from = static_cast<const float*>(item_.u) + offset;
        if (!whole_)
          load_some(from, count, number);
        else if (count > 0)
          load_fours(from, number);
      }
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) out[i] = make_float2(number[2 * i], number[2 * i + 1]);
    } else {
      load_pairs16<kRun>(static_cast<const W*>(item_.u) + offset, count, whole_, out);
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

  // The larger size of a pair's numbers.
  static __device__ __forceinline__ float size(const Pair& pair) {
    if constexpr (Traits::kWide) {
      return fmaxf(fabsf(pair.x), fabsf(pair.y));
    } else {
      const float2 numbers = unpack(W{}, pair);
      return fmaxf(fabsf(numbers.x), fabsf(numbers.y));
    }
  }

 private:
  const UpdateItem& item_;
  int64_t offset_[2];
  int rank_[2];  // 0 for a row outside of U
  bool whole_;
};

}  // namespace subzero::cuda
