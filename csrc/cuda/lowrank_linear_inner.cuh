// h = (x V) C_g^T, what lowrank_linear multiplies by U^T: (rows x r) numbers of x's dtype.
//
// A cluster has 64 rows of one group; each of its blocks takes a part of x's columns (TMA and
// wgmma), so that few rows still fill the GPU. The parts are added in the order of the blocks, and
// each block multiplies its share of the rows by the core: in parts of bf16, as exact as the fp32
// ops (mma.cuh).
#pragma once

#include <cooperative_groups.h>

#include "hopper.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace subzero::cuda {

struct LinearInner {
  const float* core;  // (groups, rank, rank)
  void* h;            // (groups group_rows, rank)
  int64_t group_rows;
  int steps;  // of kDepth along x's columns
  int rank;
};

template <int kRankUpTo>
struct InnerShape {
  static constexpr int kColumns = kRankUpTo;
  static constexpr int kRows = 64;
  static constexpr int kDepth = 64;
  static constexpr int kThreads = 160;  // a warpgroup that multiplies and a warp that copies
  static constexpr int kBox = 64 * 64 * 2;
  static constexpr int kStage = kBox + kColumns / 64 * kBox;
  static constexpr int kStages = kColumns == 64 ? 6 : 4;
  static constexpr int kSumStride = kColumns + 4;
  static constexpr int kSums = kRows * kSumStride * 4;
  static constexpr int kRing = kStages * kStage > 2 * kSums ? kStages * kStage : 2 * kSums;
  static constexpr int kShared = 1024 + kRing + 16 * kStages;
};

// Two numbers of a row, in two parts each.
struct Parts2 {
  uint32_t part[2];
  __device__ __forceinline__ explicit Parts2(const float* from) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    split(pair.x, pair.y, part);
  }
};

template <class Shape, bool kHalf>
__global__ void __launch_bounds__(Shape::kThreads)
    lowrank_linear_inner_kernel(const __grid_constant__ CUtensorMap x,
                                const __grid_constant__ CUtensorMap v, LinearInner args) {
#ifdef SUBZERO_HOPPER
  namespace cg = cooperative_groups;
  extern __shared__ uint8_t memory[];
  const cg::cluster_group cluster = cg::this_cluster();
  const int split = cluster.block_rank(), splits = cluster.num_blocks();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const uint32_t base = shared_address(memory), ring_at = (base + 1023) & ~1023u;
  const uint32_t full = ring_at + Shape::kRing, empty = full + 8 * Shape::kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, 1);
    }
    barriers_ready();
  }
  __syncthreads();

  const int64_t in_group = int64_t{blockIdx.y} * Shape::kRows;
  const int rows = static_cast<int>(min(int64_t{Shape::kRows}, args.group_rows - in_group));
  const int64_t row = blockIdx.z * args.group_rows + in_group;
  const int first = args.steps * split / splits, last = args.steps * (split + 1) / splits;
  float* const part = reinterpret_cast<float*>(memory + (ring_at - base));
  float* const whole = part + Shape::kRows * Shape::kSumStride;

  if (warp == 4) {
    if (lane == 0) {
      int stage = 0;
      uint32_t parity = 1;
      for (int step = first; step < last; ++step) {
        wait_for(empty + 8 * stage, parity);
        const uint32_t at = ring_at + stage * Shape::kStage, barrier = full + 8 * stage;
        expect_bytes(barrier, Shape::kStage);
        load_box(at, x, static_cast<int>(row), step * Shape::kDepth, barrier);
#pragma unroll
        for (int box = 0; box < Shape::kColumns / 64; ++box)
          load_box(at + (box + 1) * Shape::kBox, v, step * Shape::kDepth, 64 * box, barrier);
        if (++stage == Shape::kStages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
  } else {
    float sum[Shape::kColumns / 2] = {};
    int stage = 0;
    uint32_t parity = 0;
    for (int step = first; step < last; ++step) {
      wait_for(full + 8 * stage, parity);
      const uint32_t at = ring_at + stage * Shape::kStage;
      const uint64_t left = describe_tile(at);
      const uint64_t right = describe_tile_across(at + Shape::kBox, Shape::kBox);
      begin_products();
#pragma unroll
      for (int k = 0; k < Shape::kDepth / 16; ++k)
        Product<kHalf, Shape::kColumns, false>::add(sum, left + 2 * k, right + 128 * k);
      end_products();
      wait_for_products<0>();
      if (threadIdx.x == 0) arrive_at(empty + 8 * stage, split);
      if (++stage == Shape::kStages) stage = 0, parity ^= 1;
    }
    // All copies have come and been multiplied: the ring is free for the sums.
    asm volatile("bar.sync 1, 128;" ::: "memory");
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = part + (16 * warp + q + 8 * half) * Shape::kSumStride + 8 * j + 2 * t;
        *reinterpret_cast<float2*>(to) =
            make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
      }
  }
  cluster.sync();
  const int share = Shape::kRows / splits, from = share * split;
  for (int i = threadIdx.x; i < share * Shape::kColumns / 4; i += Shape::kThreads) {
    const int of = i / (Shape::kColumns / 4), column = i % (Shape::kColumns / 4) * 4;
    float4 parts[8], total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int block = 0; block < 8; ++block)
      if (block < splits)
        parts[block] = *reinterpret_cast<const float4*>(cluster.map_shared_rank(part, block) +
                                                        (from + of) * Shape::kSumStride + column);
#pragma unroll
    for (int block = 0; block < 8; ++block)
      if (block < splits) {
        total.x += parts[block].x, total.y += parts[block].y;
        total.z += parts[block].z, total.w += parts[block].w;
      }
    *reinterpret_cast<float4*>(whole + of * Shape::kSumStride + column) = total;
  }
  cluster.sync();  // also: no block ends before its part has been read
  if (warp == 4) return;

  // h[row, j] = sum_k whole[row, k] core[j, k]: 16 rows and 8 columns at a time.
  const float* const core = args.core + int64_t{blockIdx.z} * args.rank * args.rank;
  const int blocks = (args.rank + 7) / 8, row_blocks = (share + 15) / 16;
  for (int task = warp; task < blocks * row_blocks; task += 4) {
    const int j = task % blocks, top = task / blocks * 16;
    // Rows beyond the share are not written; what is read there is within `whole` or harmless.
    const float* const a_from = whole + (top + q) * Shape::kSumStride + 2 * t;
    const bool second = top + q + 8 < share;
    const float* const b_from = core + int64_t{min(8 * j + q, args.rank - 1)} * args.rank + 2 * t;
    float out[4] = {};
#pragma unroll 4
    for (int k = 0; k < args.rank; k += 16) {
      const bool more = k + 8 < args.rank;
      const Parts2 b0(b_from + k), b1(more ? b_from + k + 8 : b_from + k);
      const float* const low = a_from + (second ? 8 * Shape::kSumStride : 0);
      const Parts2 a0(a_from + k), a1(low + k), a2(a_from + k + 8), a3(low + k + 8);
      const uint32_t keep = more ? ~0u : 0u;
      const FragmentA high = {a0.part[0], a1.part[0], a2.part[0] & keep, a3.part[0] & keep};
      const FragmentA rest = {a0.part[1], a1.part[1], a2.part[1] & keep, a3.part[1] & keep};
      mma<false>(out, rest, b0.part[0], b1.part[0]);
      mma<false>(out, high, b0.part[1], b1.part[1]);
      mma<false>(out, high, b0.part[0], b1.part[0]);
    }
    const int column = 8 * j + 2 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = top + q + 8 * half;
      if (at < share && from + at < rows && column < args.rank) {
        const float low = out[2 * half], high = out[2 * half + 1];
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.h) +
                                     (row + from + at) * args.rank + column) =
            kHalf ? pack_f16(low, high) : pack_bf16(low, high);
      }
    }
  }
#endif
}

}  // namespace subzero::cuda
