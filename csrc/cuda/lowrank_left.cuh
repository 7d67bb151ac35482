// The kernel of P = U C, rows of which the kernel of W multiplies with V^T. It leaves P as operands
// A: for each strip of 16 rows, part and step of 16 ranks, 16 bytes a lane.
//
//   block   one panel of columns of P, and rows of one matrix, 16 to a warp at a time
//
// It is little work, but the kernel of W waits for it: many blocks, and few steps one after
// another.
#pragma once

#include "lowrank_basis.cuh"
#include "lowrank_core.cuh"

namespace subzero::cuda {

// What this kernel needs beyond the traits: C passes through shared memory, kCoreRows rows and
// kPanel columns at a time.
template <class Traits>
struct LeftTraits : Traits {
  static constexpr int kThreads = 32 * kLeftWarps;
  static constexpr int kPanel = Traits::kRank < kLeftPanel ? Traits::kRank : kLeftPanel;
  static constexpr int kPanelSteps = kPanel / 16;
  static constexpr int kCoreRows = Traits::kRank < 128 ? Traits::kRank : 128;
  static constexpr int kCorePitch = kPanel + 8;
};

// What a warp's 16 rows of U have for kCoreRows rows of C.
template <class T>
using Pairs = typename BasisRows<T>::Pair[T::kCoreRows / 16][4];

template <class T>
__device__ __forceinline__ void load_pairs(Pairs<T>& pair, const BasisRows<T>& rows, int first) {
  first += static_cast<int>(threadIdx.x) % 4 * T::kRun;
#pragma unroll
  for (int step = 0; step < T::kCoreRows / 16; step += T::kSteps2)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      typename BasisRows<T>::Pair run[T::kRun / 2];
      rows.load(h, first + 16 * step, run);
#pragma unroll
      for (int i = 0; i < T::kRun / 2; ++i) pair[step + i / 2][h + i % 2 * 2] = run[i];
    }
}

// sum += U C for the rows of C that are staged.
template <class T>
__device__ __forceinline__ void multiply_core(float (&sum)[T::kPanel / 8][4], const Pairs<T>& pair,
                                              const BasisRows<T>& rows, const uint16_t* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Lane 8 i + x: row x of matrix i, of k + 0 or 8 (i % 2) and n + 0 or 8 (i / 2).
  const uint32_t corner = shared_address(shared) + 2 * (lane % 16 * T::kCorePitch + lane / 16 * 8);
#pragma unroll
  for (int step = 0; step < T::kCoreRows / 16; ++step) {
    FragmentA u[T::kU];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[T::kU];
      rows.parts(pair[step][i], parts);
#pragma unroll
      for (int p = 0; p < T::kU; ++p) u[p][i] = parts[p];
    }
#pragma unroll
    for (int n = 0; n < T::kPanel / 8; n += 2)
#pragma unroll
      for (int c = 0; c < T::kC; ++c) {
        uint32_t b[4];
        load_matrices_transposed(
            b, corner + 2 * ((c * T::kCoreRows + 16 * step) * T::kCorePitch + 8 * n));
#pragma unroll
        for (int p = 0; p < T::kU; ++p) {
          if (p + c >= (T::kU > T::kC ? T::kU : T::kC)) continue;
          mma<false>(sum[n], u[p], b[0], b[1]);
          mma<false>(sum[n + 1], u[p], b[2], b[3]);
        }
      }
  }
}

// The largest size of a warp's rows of U so far.
template <class T>
__device__ __forceinline__ float largest(const Pairs<T>& pair, float most) {
#pragma unroll
  for (int step = 0; step < T::kCoreRows / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) most = fmaxf(most, BasisRows<T>::size(pair[step][i]));
  return largest_of(most);
}

// P of a strip for one panel, as operands A. `bound`: no number of the strip is larger.
template <class T>
__device__ __forceinline__ void put_left(const float (&sum)[T::kPanel / 8][4],
                                         const UpdateItem& item, const UpdateCall& call,
                                         int64_t strip, int panel, float bound) {
  const int lane = static_cast<int>(threadIdx.x) % 32, size = 32 * item.strip + T::kHalf;
  uint4* const out = call.left + item.left + strip * size + lane;
  float scale = 1.0f;
  if constexpr (T::kHalf) {
    // The bound becomes 2^14 and more; fp16 ends at 2^16 and has 11 bits down to 2^-14.
    const int exponent = static_cast<int>(float_bits(bound) >> 23);
    const int up = min(max(127 + 14 - exponent, -120), 120);
    scale = bits_float(static_cast<uint32_t>(127 + up) << 23);
    if (lane == 0 && panel == 0)
      out[size - 1] = make_uint4(static_cast<uint32_t>(127 - up) << 23, 0u, 0u, 0u);
  }
#pragma unroll
  for (int step = 0; step < T::kPanelSteps; ++step) {
    FragmentA part[T::kP];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // n-blocks 2 step and 2 step + 1 are columns 0-7 and 8-15 of the fragment.
      const float low = sum[2 * step + i / 2][i % 2 * 2];
      const float high = sum[2 * step + i / 2][i % 2 * 2 + 1];
      if constexpr (T::kHalf) {
        part[0][i] = pack_f16(low * scale, high * scale);
      } else {
        uint32_t parts[T::kP];
        split(low, high, parts);
#pragma unroll
        for (int p = 0; p < T::kP; ++p) part[p][i] = parts[p];
      }
    }
#pragma unroll
    for (int p = 0; p < T::kP; ++p) {
      const FragmentA& a = part[p];
      out[(p * item.steps + panel * T::kPanelSteps + step) * 32] =
          make_uint4(a[0], a[1], a[2], a[3]);
    }
  }
}

template <class Traits, class Batch>
__global__ void __launch_bounds__(32 * kLeftWarps)
    lowrank_left_kernel(const __grid_constant__ Batch batch,
                        const __grid_constant__ UpdateCall call) {
  using T = LeftTraits<Traits>;
  __shared__ __align__(16) uint16_t shared[T::kC * T::kCoreRows * T::kCorePitch];
  // In this order: whatever starts after may rely on what this kernel waited for.
  wait_for_launch_before();
  allow_launch_after();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int place = batch.find(batch.first_block, blockIdx.x);
  const UpdateItem& item = batch.items[place];
  const uint32_t block = blockIdx.x - batch.first_block[place];
  const uint32_t panels = static_cast<uint32_t>(item.panels());
  const int panel = static_cast<int>(block % panels);
  const int64_t first_strip = int64_t{block / panels} * batch.left_turns * kLeftWarps + warp;
  const float core_bound = T::kHalf ? bound_of_core<T>(item, call) : 0.0f;
  for (int turn = 0; turn < batch.left_turns; ++turn) {
    const int64_t strip = first_strip + turn * kLeftWarps;
    const BasisRows<T> rows(item, 16 * strip + lane / 4);
    float sum[T::kPanel / 8][4] = {}, bound = 0.0f;
    for (int first = 0; first < item.rank; first += T::kCoreRows) {
      Pairs<T> pair;
      load_pairs<T>(pair, rows, first);
      if constexpr (T::kHalf) bound = largest<T>(pair, bound);
      if (turn == 0 || item.rank > T::kCoreRows) {
        if (turn > 0 || first > 0) __syncthreads();
        stage_core<T>(item, call, first, panel * T::kPanel, shared);
        __syncthreads();
      }
      multiply_core<T>(sum, pair, rows, shared);
    }
    if (16 * strip < item.rows)
      put_left<T>(sum, item, call, strip, panel,
                  bound * core_bound * static_cast<float>(item.rank));
  }
}

}  // namespace subzero::cuda
