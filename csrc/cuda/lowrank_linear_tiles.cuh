// How lowrank_linear's product is cut: the tiles of y, the order they are made in, what the host
// tells the kernel.
#pragma once

#include <cstdint>

namespace subzero::cuda {

// What is added to y: the bias, one row for each group of rows, or none.
struct LinearBias {
  const void* data;
  int64_t stride;  // from row to row
  bool single;     // fp32, else as y
  bool grouped;
};

// Rows and columns of y, contiguous.
struct LinearOut {
  void* data;
  int rows;
  int columns;
};

// h = (x V) C_g^T where the kernel makes it itself.
struct LinearInside {
  const float* core;  // (groups, rank, rank)
  void* h;            // (rows, rank)
  int* ready;  // a counter for each tile's rows, zero at first: warpgroups that wrote their h
};

struct LinearTiles {
  int row_blocks;    // rows of y in tiles
  int group_blocks;  // of one group: no tile has rows of two
  int group_rows;    // rows of y of one group
  int row_clusters;  // rows of y in tiles of a cluster
  int columns;       // columns of y in tiles
  int steps;         // of kDepth along x's columns
  int rank;
};

// A tile of kRows x kColumns of y for a thread block, kBlocksOf64 times 64 rows for each of its two
// warpgroups.
template <int kBlocksOf64, int kColumnsOfTile>
struct LinearShape {
  static constexpr int kBlocks = kBlocksOf64;
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr int kRows = 128 * kBlocks;
  static constexpr int kDepth = 64;
  static constexpr int kInner = 64;  // columns of h at most, where the kernel makes it
  static constexpr int kCluster = 2;
  static constexpr int kThreads = 384;
  static constexpr int kBytesA = kRows * kDepth * 2;
  static constexpr int kBytesB = kColumns * kDepth * 2;
  static constexpr int kBytesInner = kInner * kDepth * 2;
  static constexpr int kStage = kBytesA + kBytesB;
  static constexpr int kBiasBytes = 2 * kColumns * 4;
  static constexpr int kStages = (227 * 1024 - 1024 - kBiasBytes - 256) / kStage;
  static constexpr bool kSmall = kBlocks * kColumns <= 128;
  static constexpr int kShared = 1024 + kStages * kStage + 16 * kStages + kBiasBytes;
};

// Tiles of clusters in an order that keeps what is read at a time small: kBand rows of tiles,
// column by column. kInside: the first column of each band are the tiles of h, which wait for no
// other: what waits for them comes after, so there is always one that can go on.
template <bool kInside>
struct TilePlace {
  static constexpr int kBand = 4;
  int row, column;  // in tiles; rows in those of a cluster; column -1: of h

  static __device__ __forceinline__ int count(const LinearTiles& tiles) {
    return tiles.row_clusters * (tiles.columns + kInside);
  }
  __device__ __forceinline__ TilePlace(int tile, const LinearTiles& tiles) {
    const int columns = tiles.columns + kInside;
    const int first = tile / (kBand * columns) * kBand;
    const int high = min(kBand, tiles.row_clusters - first), rest = tile - first * columns;
    row = first + rest % high;
    column = rest / high - kInside;
  }
};

// The rows of y of one tile.
struct TileRows {
  int first, last, group;

  template <class Shape>
  static __device__ __forceinline__ TileRows of(int block, const LinearTiles& tiles, int rows) {
    if (block >= tiles.row_blocks) return {rows, rows, 0};
    const int group = block / tiles.group_blocks;
    const int first = group * tiles.group_rows + block % tiles.group_blocks * Shape::kRows;
    return {first, min(first + Shape::kRows, (group + 1) * tiles.group_rows), group};
  }
};

}  // namespace subzero::cuda
