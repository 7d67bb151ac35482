// y = x W^T + h U^T + b on Hopper: one product whose k runs over x's columns and then over h's, so
// that y is rounded once and never read.
//
// A thread block has a tile of y at a time: one warp copies tiles of x and W (then of h and U) into
// a ring by TMA, two warpgroups multiply them (wgmma) and write the sums. Two blocks of a cluster
// have the rows below each other: each copies half of the tile of W, to both. There are as many
// blocks as multiprocessors and they take tile after tile.
//
// With kInside the first tiles are those of h = (x V) C_g^T, as if V^T were more rows of W; what
// needs h waits for it at the end of its k. Without, h comes from the kernel before.
#pragma once

#include "hopper.cuh"
#include "instructions.cuh"
#include "launch.cuh"
#include "lowrank_linear_tiles.cuh"
#include "mma.cuh"

namespace subzero::cuda {

struct LinearMaps {
  CUtensorMap x, w, h, u, v;
};

// The ring of a thread block's shared memory, and whose turn it is.
template <class Shape>
struct LinearRing {
  static constexpr int kStages = Shape::kStages;

  uint32_t tiles_at;
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit LinearRing(uint32_t shared)
      : tiles_at((shared + 1023) & ~1023u) {}
  __device__ __forceinline__ uint32_t full() const {
    return tiles_at + kStages * Shape::kStage + 8 * stage;
  }
  __device__ __forceinline__ uint32_t empty_of(int which) const {
    return tiles_at + kStages * Shape::kStage + 8 * kStages + 8 * which;
  }
  __device__ __forceinline__ uint32_t end() const { return empty_of(kStages); }
  __device__ __forceinline__ uint32_t a() const { return tiles_at + stage * Shape::kStage; }
  __device__ __forceinline__ uint32_t b() const { return a() + Shape::kBytesA; }
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }

  // One thread of the block makes the barriers: a stage is full by one thread's copies and empty
  // when both warpgroups of both blocks of the cluster have multiplied it.
  __device__ __forceinline__ void make_barriers() {
    for (stage = 0; stage < kStages; ++stage) {
      init_barrier(full(), 1);
      init_barrier(empty_of(stage), 2 * Shape::kCluster);
    }
    stage = 0;
    barriers_ready();
  }

  // Rows `row` .. of the left matrix; block `rank`'s half of the tile of the right one, for both.
  __device__ __forceinline__ void copy(const CUtensorMap& left, int row, int k,
                                       const CUtensorMap& right, int right_row, int right_column,
                                       int right_bytes, uint32_t rank) {
    wait_for(empty_of(stage), parity ^ 1);
    expect_bytes(full(), Shape::kBytesA + right_bytes);
    load_box(a(), left, row, k, full());
    load_box_to(3, b() + rank * (right_bytes / 2), right, right_row, right_column, full());
    next();
  }

  __device__ __forceinline__ void release(int which, bool leader) const {
    if (leader) {
      arrive_at(empty_of(which), 0);
      arrive_at(empty_of(which), 1);
    }
  }
};

// sum += A B^T, kSteps of 16 along k from the first'th of a stage; A's are the warpgroup's rows.
// kAlong: k runs along the rows of B's tile, else down its columns.
template <class Shape, bool kHalf, bool kAlong, int kSteps, int kColumns>
__device__ __forceinline__ void multiply(float (&sum)[Shape::kBlocks][kColumns / 2],
                                         const LinearRing<Shape>& ring, int group, int first = 0) {
  const uint64_t left = describe_tile(ring.a() + group * Shape::kBlocks * 8192) + 2 * first;
  const uint64_t right = describe_tile(ring.b()) + (kAlong ? 2 : 128) * first;
  begin_products();
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < Shape::kBlocks; ++i)
      Product<kHalf, kColumns, kAlong>::add(sum[i], left + i * 512 + 2 * k,
                                            right + (kAlong ? 2 : 128) * k);
  end_products();
}

// sum = A B^T over `steps` whole stages, of which the last is not waited for: the products of one
// run while those of the next are given out. Returns that last stage.
template <class Shape, bool kHalf, bool kAlong, int kColumns>
__device__ __forceinline__ int multiply_stages(float (&sum)[Shape::kBlocks][kColumns / 2],
                                               LinearRing<Shape>& ring, int steps, int group,
                                               bool leader) {
#pragma unroll
  for (int i = 0; i < Shape::kBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) sum[i][j] = 0;
  wait_for(ring.full(), ring.parity);
  multiply<Shape, kHalf, kAlong, 4, kColumns>(sum, ring, group);
  int before = ring.stage;
  ring.next();
  for (int k = 1; k < steps; ++k) {
    wait_for(ring.full(), ring.parity);
    multiply<Shape, kHalf, kAlong, 4, kColumns>(sum, ring, group);
    wait_for_products<1>();
    ring.release(before, leader);
    before = ring.stage;
    ring.next();
  }
  return before;
}

// The threads of one of the two warpgroups that multiply.
__device__ __forceinline__ void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// h = T C^T for 64 rows of T = x V, which a warpgroup has in its registers as the products left it:
// two blocks of 8 columns are operand A of 16 along k. Everything in two parts of bf16 (mma.cuh).
template <class Shape, bool kHalf>
__device__ __forceinline__ void write_inner(const float (&sum)[Shape::kInner / 2],
                                            const float* core, void* h, int rank, int row,
                                            int last) {
  constexpr int kSteps = Shape::kInner / 16;
  const int q = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  FragmentA part[2][kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[2];
      split(sum[8 * k + 2 * i], sum[8 * k + 2 * i + 1], parts);
      part[0][k][i] = parts[0], part[1][k][i] = parts[1];
    }
#pragma unroll 2
  for (int j = 0; j < rank; j += 8) {
    float2 numbers[kSteps][2];
    const float* const from = core + (j + q) * rank + 2 * t;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        numbers[k][i] = 16 * k + 8 * i < rank
                            ? __ldg(reinterpret_cast<const float2*>(from + 16 * k + 8 * i))
                            : make_float2(0, 0);
    float out[4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b0[2], b1[2];
      split(numbers[k][0].x, numbers[k][0].y, b0);
      split(numbers[k][1].x, numbers[k][1].y, b1);
      mma<false>(out, part[1][k], b0[0], b1[0]);
      mma<false>(out, part[0][k], b0[1], b1[1]);
      mma<false>(out, part[0][k], b0[0], b1[0]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row + q + 8 * half < last)
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(h) +
                                     int64_t{row + q + 8 * half} * rank + j + 2 * t) =
            kHalf ? pack_f16(out[2 * half], out[2 * half + 1])
                  : pack_bf16(out[2 * half], out[2 * half + 1]);
  }
}

// Of four lanes, each with the words of four 8-column blocks: lane t gets block t's, in order.
__device__ __forceinline__ void exchange(uint32_t (&word)[4], int t) {
  const auto swap = [&](uint32_t& low, uint32_t& high, int with) {
    const bool upper = t & with;
    const uint32_t come = __shfl_xor_sync(~0u, upper ? low : high, with);
    (upper ? low : high) = come;
  };
  swap(word[0], word[1], 1);
  swap(word[2], word[3], 1);
  swap(word[0], word[2], 2);
  swap(word[1], word[3], 2);
}

// Number `at` of the bias.
template <bool kHalf>
__device__ __forceinline__ float bias_at(const LinearBias& bias, int64_t at) {
  if (bias.single) return __ldg(static_cast<const float*>(bias.data) + at);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(bias.data) + at);
  return kHalf ? unpack_f16(bits).x : low_bf16(bits);
}

// Row `row` of the bias, the numbers of a tile's columns, by a warpgroup.
template <class Shape, bool kHalf>
__device__ __forceinline__ void load_bias(float* to, const LinearOut& y, const LinearBias& bias,
                                          int row, int column) {
  for (int j = threadIdx.x % 128; j < Shape::kColumns; j += 128)
    to[j] = bias.data && column + j < y.columns
                ? bias_at<kHalf>(bias, row * bias.stride + column + j)
                : 0;
}

// Of 64 rows those before `last`: the sums and the bias of the tile's columns to y.
// `row` and `column`: of y, the first of the lane's warp.
template <class Shape, bool kHalf>
__device__ __forceinline__ void write_sums(const float (&sum)[Shape::kColumns / 2],
                                           const LinearOut& y, const float* bias, int last, int row,
                                           int column) {
  const int q = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint16_t* const to =
      static_cast<uint16_t*>(y.data) + int64_t{row + q} * y.columns + column + 8 * t;
#pragma unroll
  for (int wide = 0; wide < Shape::kColumns / 32; ++wide) {
    uint32_t word[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 4 * wide + i;
      const float2 more = reinterpret_cast<const float2*>(bias)[4 * j + t];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = sum[4 * j + 2 * half] + more.x, high = sum[4 * j + 2 * half + 1] + more.y;
        word[half][i] = kHalf ? pack_f16(low, high) : pack_bf16(low, high);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exchange(word[half], t);
      if (row + q + 8 * half < last && column + 32 * wide + 8 * t < y.columns)
        store16<StoreHint::none>(to + 8 * half * int64_t{y.columns} + 32 * wide,
                                 {word[half][0], word[half][1], word[half][2], word[half][3]});
    }
  }
}

// The warp that copies, one thread of it.
template <class Shape, bool kInside>
__device__ __forceinline__ void copy_tiles(LinearRing<Shape> ring, const LinearMaps& maps,
                                           const LinearTiles& tiles, const LinearOut& y,
                                           const LinearInside& inside, uint32_t rank) {
  const int first = blockIdx.x / Shape::kCluster, step = gridDim.x / Shape::kCluster;
  for (int tile = first; tile < TilePlace<kInside>::count(tiles); tile += step) {
    const TilePlace<kInside> place(tile, tiles);
    const int block = place.row * Shape::kCluster + rank;
    const int row = TileRows::of<Shape>(block, tiles, y.rows).first;
    if (kInside && place.column < 0) {
      for (int k = 0; k < tiles.steps; ++k)
        ring.copy(maps.x, row, k * Shape::kDepth, maps.v,
                  k * Shape::kDepth + rank * (Shape::kDepth / 2), 0, Shape::kBytesInner, rank);
      continue;
    }
    const int column = place.column * Shape::kColumns + rank * (Shape::kColumns / 2);
    for (int k = 0; k < tiles.steps; ++k)
      ring.copy(maps.x, row, k * Shape::kDepth, maps.w, column, k * Shape::kDepth, Shape::kBytesB,
                rank);
    if constexpr (kInside) {
      if (block < tiles.row_blocks) wait_until(inside.ready + block, 2);
      order_copies();
    }
    for (int k = 0; k < tiles.rank; k += Shape::kDepth)
      ring.copy(maps.h, row, k, maps.u, column, k, Shape::kBytesB, rank);
  }
}

// Of a tile, the rows of one of the two warpgroups and the first of the lane's warp.
template <class Shape>
struct LanePlace {
  int group, row;
  __device__ __forceinline__ explicit LanePlace(int warpgroup)
      : group(warpgroup), row(warpgroup * Shape::kBlocks * 64 + threadIdx.x % 128 / 32 * 16) {}
  __device__ __forceinline__ bool leads() const { return threadIdx.x % 128 == 0; }
};

// A tile of h.
template <class Shape, bool kHalf>
__device__ __forceinline__ void make_inner(LinearRing<Shape>& ring, const LinearTiles& tiles,
                                           const LinearInside& inside, const TileRows& rows,
                                           int block, const LanePlace<Shape>& place) {
  const float* const core = inside.core + int64_t{rows.group} * tiles.rank * tiles.rank;
  for (int i = threadIdx.x % 128 * 32; i < tiles.rank * tiles.rank; i += 128 * 32)
    prefetch(core + i);
  float sum[Shape::kBlocks][Shape::kInner / 2];
  const int before = multiply_stages<Shape, kHalf, false, Shape::kInner>(
      sum, ring, tiles.steps, place.group, place.leads());
  wait_for_products<0>();
  ring.release(before, place.leads());
#pragma unroll
  for (int i = 0; i < Shape::kBlocks; ++i)
    write_inner<Shape, kHalf>(sum[i], core, inside.h, tiles.rank, rows.first + place.row + 64 * i,
                              rows.last);
  order_copies();
  sync_warpgroup(place.group);
  if (place.leads() && block < tiles.row_blocks) count_up(inside.ready + block);
}

// A tile of y; `numbers` are the warpgroup's own, for the bias.
template <class Shape, bool kHalf>
__device__ __forceinline__ void make_y(LinearRing<Shape>& ring, const LinearTiles& tiles,
                                       const LinearOut& y, const LinearBias& bias, float* numbers,
                                       const TileRows& rows, int column,
                                       const LanePlace<Shape>& place) {
  // Read where nothing waits for it.
  load_bias<Shape, kHalf>(numbers, y, bias, bias.grouped ? rows.group : 0, column);
  float sum[Shape::kBlocks][Shape::kColumns / 2];
  int before = multiply_stages<Shape, kHalf, true, Shape::kColumns>(sum, ring, tiles.steps,
                                                                    place.group, place.leads());
  for (int left = tiles.rank; left > 0; left -= Shape::kDepth) {
    wait_for(ring.full(), ring.parity);
    for (int k = 0; k < min(4, (left + 15) / 16); ++k)
      multiply<Shape, kHalf, true, 1, Shape::kColumns>(sum, ring, place.group, k);
    wait_for_products<1>();
    ring.release(before, place.leads());
    before = ring.stage;
    ring.next();
  }
  wait_for_products<0>();
  ring.release(before, place.leads());
  sync_warpgroup(place.group);
#pragma unroll
  for (int i = 0; i < Shape::kBlocks; ++i)
    write_sums<Shape, kHalf>(sum[i], y, numbers, rows.last, rows.first + place.row + 64 * i,
                             column);
  sync_warpgroup(place.group);
}

// A warpgroup that multiplies.
template <class Shape, bool kHalf, bool kInside>
__device__ __forceinline__ void multiply_tiles(LinearRing<Shape> ring, const LinearTiles& tiles,
                                               const LinearOut& y, const LinearBias& bias,
                                               float* numbers, const LinearInside& inside,
                                               uint32_t rank, int group) {
  const LanePlace<Shape> lane(group);
  const int first = blockIdx.x / Shape::kCluster, step = gridDim.x / Shape::kCluster;
  for (int tile = first; tile < TilePlace<kInside>::count(tiles); tile += step) {
    const TilePlace<kInside> place(tile, tiles);
    const int block = place.row * Shape::kCluster + rank;
    const TileRows rows = TileRows::of<Shape>(block, tiles, y.rows);
    if (kInside && place.column < 0)
      make_inner<Shape, kHalf>(ring, tiles, inside, rows, block, lane);
    else
      make_y<Shape, kHalf>(ring, tiles, y, bias, numbers, rows, place.column * Shape::kColumns,
                           lane);
  }
}

template <class Shape, bool kHalf, bool kInside>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    lowrank_linear_kernel(const __grid_constant__ LinearMaps maps, LinearTiles tiles, LinearOut y,
                          LinearBias bias, LinearInside inside) {
#ifdef SUBZERO_HOPPER
  extern __shared__ uint8_t memory[];
  LinearRing<Shape> ring(shared_address(memory));
  const uint32_t rank = cluster_rank();
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) ring.make_barriers();
  cluster_arrive();
  cluster_wait();
  if (warpgroup == 0) {
    leave_registers<40>();
    if (threadIdx.x == 0) copy_tiles<Shape, kInside>(ring, maps, tiles, y, inside, rank);
  } else {
    take_registers<232>();
    float* const numbers = reinterpret_cast<float*>(memory + (ring.end() - shared_address(memory)));
    multiply_tiles<Shape, kHalf, kInside>(ring, tiles, y, bias,
                                          numbers + (warpgroup - 1) * Shape::kColumns, inside, rank,
                                          warpgroup - 1);
  }
  // No block ends while another may copy to it or arrive at its barriers.
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace subzero::cuda
