// The kernel of P = U C, rows of which the kernel of W multiplies with V^T. It leaves P as operands
// A: for each strip of 16 rows, part and step of 16 ranks, 16 bytes a lane.
#pragma once

#include "lowrank_basis.cuh"
#include "lowrank_core.cuh"

namespace subzero::cuda {

// What this kernel needs beyond the traits: C passes through shared memory, kCoreRows rows and
// kPanel columns at a time.
template <class Traits>
struct LeftTraits : Traits {
  static constexpr int kThreads = 32 * kLeftWarps;
  static constexpr int kPanel = Traits::kRank < 64 ? Traits::kRank : 64;
  static constexpr int kCoreRows = kPanel;
  static constexpr int kCorePitch = kPanel + 8;
  static constexpr int kPanels = Traits::kRank / kPanel;
};

// P of a warp's 16 rows as fragments A, and what its numbers are to be multiplied by.
template <class T>
struct Left {
  FragmentA part[T::kP][T::kSteps];
  float unscale;
};

// sum = U C for kPanel columns of C from `column`.
template <class T>
__device__ __forceinline__ void make_panel(float (&sum)[T::kPanel / 8][4], const BasisRows<T>& rows,
                                           const UpdateItem& item, const UpdateCall& call,
                                           int column, uint16_t* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Lane 8 i + x: row x of matrix i, of k + 0 or 8 (i % 2) and n + 0 or 8 (i / 2).
  const uint32_t corner = shared_address(shared) + 2 * (lane % 16 * T::kCorePitch + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < T::kPanel / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
  for (int first = 0; first < item.rank; first += T::kCoreRows) {
    constexpr int kSteps = T::kCoreRows / 16;
    typename BasisRows<T>::Pair pair[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[step][i] = rows.load(i % 2, first + 16 * step + 8 * (i / 2) + lane % 4 * 2);
    if (column > 0 || first > 0) __syncthreads();
    stage_core<T>(item, call, first, column, shared);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      FragmentA u[T::kU];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t parts[T::kU];
        rows.parts(pair[step][i], parts);
#pragma unroll
        for (int p = 0; p < T::kU; ++p) u[p][i] = parts[p];
      }
#pragma unroll
      for (int n = 0; n < T::kPanel / 8; n += 2) {
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
  }
}

// The largest number of a warp's 16 rows.
template <int kCount>
__device__ __forceinline__ float largest(const float (&sum)[kCount][4]) {
  float most = 0.0f;
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(sum[n][i]));
#pragma unroll
  for (int other = 16; other > 0; other /= 2)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, other));
  return most;
}

template <class T>
__device__ __forceinline__ Left<T> make_left(const UpdateItem& item, const UpdateCall& call,
                                             int64_t row, uint16_t* shared) {
  constexpr int kPanelSteps = T::kPanel / 16;
  const BasisRows<T> rows(item, row);
  Left<T> left;
  float most = 0.0f, scale = 1.0f;
#pragma unroll
  for (int panel = 0; panel < T::kPanels; ++panel) {
    float sum[T::kPanel / 8][4];
    make_panel<T>(sum, rows, item, call, panel * T::kPanel, shared);
    if constexpr (T::kHalf) {
      // The largest number so far becomes 2^13 and more; fp16 ends at 2^16.
      most = fmaxf(most, largest(sum));
      const int exponent = static_cast<int>(float_bits(most) >> 23);
      const int up = min(max(127 + 13 - exponent, -120), 120);
      const float before = scale;
      scale = bits_float(static_cast<uint32_t>(127 + up) << 23);
      left.unscale = bits_float(static_cast<uint32_t>(127 - up) << 23);
      if (panel > 0) {
        const __half2 down = __float2half2_rn(scale / before);
#pragma unroll
        for (int step = 0; step < panel * kPanelSteps; ++step)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t& x = left.part[0][step][i];
            x = bits_of(__hmul2(half2_of(x), down));
          }
      }
    }
#pragma unroll
    for (int step = 0; step < kPanelSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // n-blocks 2 step and 2 step + 1 are columns 0-7 and 8-15 of the fragment.
        const float low = sum[2 * step + i / 2][i % 2 * 2];
        const float high = sum[2 * step + i / 2][i % 2 * 2 + 1];
        const int at = panel * kPanelSteps + step;
        if constexpr (T::kHalf) {
          left.part[0][at][i] = pack_f16(low * scale, high * scale);
        } else {
          uint32_t parts[T::kP];
          split(low, high, parts);
#pragma unroll
          for (int p = 0; p < T::kP; ++p) left.part[p][at][i] = parts[p];
        }
      }
  }
  return left;
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
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int place = batch.find(batch.first_block, blockIdx.x);
  const UpdateItem& item = batch.items[place];
  const int64_t strip =
      static_cast<int64_t>(blockIdx.x - batch.first_block[place]) * kLeftWarps + threadIdx.x / 32;
  const Left<T> left = make_left<T>(item, call, 16 * strip + lane / 4, shared);
  if (16 * strip >= item.rows) return;
  const int steps = item.steps;
  uint4* const out = call.left + item.left + strip * (T::kP * steps * 32) + lane;
#pragma unroll
  for (int p = 0; p < T::kP; ++p)
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step)
      if (step < steps) {
        const FragmentA& a = left.part[p][step];
        out[(p * steps + step) * 32] = make_uint4(a[0], a[1], a[2], a[3]);
      }
  if (T::kHalf && lane == 0) item.scales(call)[strip] = left.unscale;
}

}  // namespace subzero::cuda
