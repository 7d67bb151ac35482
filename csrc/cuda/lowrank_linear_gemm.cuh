// y = x W^T + h U^T + b on Hopper: one product whose k runs over x's columns and then over h's, so
// that y is rounded once and never read.
//
// A thread block has 128 kBlocks rows and kColumns columns of y at a time: one warp copies tiles of
// x and W (then of h and U) into a ring of kStages by TMA, two warpgroups multiply them (wgmma) and
// write the sums. Two blocks of a cluster have the rows below each other: each copies half of the
// tile of W, to both. Blocks are as many as the GPU has multiprocessors and take tile after tile.
#pragma once

#include "hopper.cuh"
#include "instructions.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace subzero::cuda {

struct LinearTiles {
  int row_blocks;    // rows of y in tiles
  int group_blocks;  // of one group: no tile has rows of two
  int row_clusters;  // rows of y in tiles of a cluster
  int columns;       // columns of y in tiles
  int steps;         // of kDepth along x's columns
  int rank;
};

// What is added to y: the bias, one row for each group of rows, or none.
struct LinearBias {
  const void* data;
  bool single;     // fp32, else as y
  int group_rows;  // rows of y that share one; all of them: one bias
};

// Rows and columns of y, contiguous.
struct LinearOut {
  void* data;
  int rows;
  int columns;
};

template <int kBlocksOf64, int kColumnsOfTile>
struct LinearShape {
  static constexpr int kBlocks = kBlocksOf64;  // of 64 rows, for each of the two warpgroups
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr int kRows = 128 * kBlocks;
  static constexpr int kDepth = 64;
  static constexpr int kCluster = 2;
  static constexpr int kThreads = 384;
  static constexpr int kBytesA = kRows * kDepth * 2;
  static constexpr int kBytesB = kColumns * kDepth * 2;
  static constexpr int kStage = kBytesA + kBytesB;
  static constexpr int kMemory = 227 * 1024;
  static constexpr int kBiasBytes = 2 * kColumns * 4;
  static constexpr int kStages = (kMemory - 1024 - kBiasBytes - 256) / kStage;
  static constexpr int kShared = 1024 + kStages * kStage + 16 * kStages + kBiasBytes;
};

// Tiles of clusters in an order that keeps what is read at a time small: kBand rows of tiles,
// column by column.
struct TilePlace {
  int row, column;  // in tiles; rows in those of a cluster
  static constexpr int kBand = 4;

  __device__ __forceinline__ TilePlace(int tile, const LinearTiles& tiles) {
    const int band = tile / (kBand * tiles.columns), first = band * kBand;
    const int high = min(kBand, tiles.row_clusters - first), rest = tile - first * tiles.columns;
    row = first + rest % high;
    column = rest / high;
  }
};

// The rows of y of one tile.
struct TileRows {
  int first, last, group;

  template <class Shape>
  static __device__ __forceinline__ TileRows of(int block, const LinearTiles& tiles, int rows,
                                                int group_rows) {
    if (block >= tiles.row_blocks) return {rows, rows, 0};
    const int group = block / tiles.group_blocks;
    const int first = group * group_rows + block % tiles.group_blocks * Shape::kRows;
    return {first, min(first + Shape::kRows, (group + 1) * group_rows), group};
  }
};

template <class Shape, bool kHalf>
struct LinearBlock {
  static constexpr int kStages = Shape::kStages;
  static constexpr int kHalfB = Shape::kBytesB / 2;

  uint32_t tiles_at, full_at, empty_at;

  __device__ __forceinline__ explicit LinearBlock(uint32_t shared) {
    tiles_at = (shared + 1023) & ~1023u;
    full_at = tiles_at + kStages * Shape::kStage;
    empty_at = full_at + 8 * kStages;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return full_at + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return empty_at + 8 * stage; }
  __device__ __forceinline__ uint32_t a(int stage) const {
    return tiles_at + stage * Shape::kStage;
  }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + Shape::kBytesA; }

  // ---- the thread that copies

  struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  __device__ __forceinline__ void copy(Ring& ring, const CUtensorMap& left,
                                       const CUtensorMap& right, int row, int column, int k,
                                       uint32_t rank) const {
    wait_for(empty(ring.stage), ring.parity ^ 1);
    const uint32_t barrier = full(ring.stage);
    expect_bytes(barrier, Shape::kStage);
    // A box has at most 256 rows; two of A's that the two warpgroups take.
    load_box(a(ring.stage), left, row, k, barrier);
    load_box_to(3, b(ring.stage) + rank * kHalfB, right, column + rank * (Shape::kColumns / 2), k,
                barrier);
    ring.next();
  }

  // ---- the warpgroups that multiply

  float sum[Shape::kBlocks][Shape::kColumns / 2];

  // kSteps of 16 along k, from the first'th of a stage's tiles.
  template <int kSteps>
  __device__ __forceinline__ void multiply(int stage, int group, int first) {
    const uint64_t right = describe_tile(b(stage)) + 2 * first;
    const uint64_t left = describe_tile(a(stage) + group * Shape::kBlocks * 8192) + 2 * first;
    begin_products();
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < Shape::kBlocks; ++i)
        Product<kHalf, Shape::kColumns>::add(sum[i], left + i * 512 + 2 * k, right + 2 * k);
    end_products();
  }

  __device__ __forceinline__ void release(int stage, bool first) const {
    if (first) {
      arrive_at(empty(stage), 0);
      arrive_at(empty(stage), 1);
    }
  }
};

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
                ? bias_at<kHalf>(bias, int64_t{row} * y.columns + column + j)
                : 0;
}

// The threads of one of the two warpgroups that multiply.
__device__ __forceinline__ void sync_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
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

template <class Shape, bool kHalf>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    lowrank_linear_kernel(const __grid_constant__ CUtensorMap x,
                          const __grid_constant__ CUtensorMap w,
                          const __grid_constant__ CUtensorMap h,
                          const __grid_constant__ CUtensorMap u, LinearTiles tiles, LinearOut y,
                          LinearBias bias) {
#ifdef SUBZERO_HOPPER
  extern __shared__ uint8_t memory[];
  using Block = LinearBlock<Shape, kHalf>;
  Block block(shared_address(memory));
  const uint32_t rank = cluster_rank();
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Block::kStages; ++stage) {
      init_barrier(block.full(stage), 1);
      init_barrier(block.empty(stage), 2 * Shape::kCluster);
    }
    barriers_ready();
  }
  cluster_arrive();
  cluster_wait();

  const int all = tiles.row_clusters * tiles.columns;
  const int first = blockIdx.x / Shape::kCluster, step = gridDim.x / Shape::kCluster;
  const int tail_steps = (tiles.rank + Shape::kDepth - 1) / Shape::kDepth;

  if (warpgroup == 0) {
    leave_registers<40>();
    if (threadIdx.x == 0) {
      typename Block::Ring ring;
      for (int tile = first; tile < all; tile += step) {
        const TilePlace place(tile, tiles);
        const int row =
            TileRows::of<Shape>(place.row * Shape::kCluster + rank, tiles, y.rows, bias.group_rows)
                .first;
        const int column = place.column * Shape::kColumns;
        for (int k = 0; k < tiles.steps; ++k)
          block.copy(ring, x, w, row, column, k * Shape::kDepth, rank);
        if (tile == first) wait_for_launch_before();  // h comes from the kernel before
        for (int k = 0; k < tail_steps; ++k)
          block.copy(ring, h, u, row, column, k * Shape::kDepth, rank);
      }
    }
  } else {
    take_registers<232>();
    const int group = warpgroup - 1;
    const bool leader = threadIdx.x % 128 == 0;
    float* const numbers = reinterpret_cast<float*>(memory + (block.empty_at + 8 * Block::kStages -
                                                              shared_address(memory))) +
                           group * Shape::kColumns;
    typename Block::Ring ring;
    for (int tile = first; tile < all; tile += step) {
      const TilePlace place(tile, tiles);
      const TileRows rows =
          TileRows::of<Shape>(place.row * Shape::kCluster + rank, tiles, y.rows, bias.group_rows);
      const int row = rows.first + group * Shape::kBlocks * 64 + threadIdx.x % 128 / 32 * 16;
      const int column = place.column * Shape::kColumns;
#pragma unroll
      for (int i = 0; i < Shape::kBlocks; ++i)
#pragma unroll
        for (int j = 0; j < Shape::kColumns / 2; ++j) block.sum[i][j] = 0;
      // Read where nothing waits for it.
      load_bias<Shape, kHalf>(numbers, y, bias, rows.group, column);
      // The products of one stage run while those of the next are given out.
      wait_for(block.full(ring.stage), ring.parity);
      block.template multiply<4>(ring.stage, group, 0);
      int before = ring.stage;
      ring.next();
      for (int k = 1; k < tiles.steps; ++k) {
        wait_for(block.full(ring.stage), ring.parity);
        block.template multiply<4>(ring.stage, group, 0);
        wait_for_products<1>();
        block.release(before, leader);
        before = ring.stage;
        ring.next();
      }
      for (int left = tiles.rank; left > 0; left -= Shape::kDepth) {
        wait_for(block.full(ring.stage), ring.parity);
        for (int k = 0; k < min(4, (left + 15) / 16); ++k)
          block.template multiply<1>(ring.stage, group, k);
        wait_for_products<1>();
        block.release(before, leader);
        before = ring.stage;
        ring.next();
      }
      wait_for_products<0>();
      block.release(before, leader);
      sync_warpgroup(group);
#pragma unroll
      for (int i = 0; i < Shape::kBlocks; ++i)
        write_sums<Shape, kHalf>(block.sum[i], y, numbers, rows.last, row + 64 * i, column);
      sync_warpgroup(group);
    }
  }
  // No block ends while another may copy to it or arrive at its barriers.
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace subzero::cuda
