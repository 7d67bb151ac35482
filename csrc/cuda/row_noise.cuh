// Rows of noise that begin anywhere in a block of the generator: a thread takes one block, four
// neighbouring elements, of which a row's first and last block may hold fewer.
#pragma once

#include "../philox.h"
#include "launch.cuh"

namespace subzero::cuda {

// The part of a row that lies in one block: normal j belongs to column `column + j`, if that is
// not outside of the row.
struct Quad {
  uint64_t block;
  int64_t column;
};

__device__ __forceinline__ Quad quad_of_row(int64_t first_element, int64_t index) {
  return {static_cast<uint64_t>(first_element / 4 + index), 4 * index - first_element % 4};
}

// Blocks that a row touches wherever it begins.
SUBZERO_HD int64_t quads_of_row(int64_t columns) {
  return (columns + 6) / 4;
}

// Threads for `rows` rows of `quads`: x along a row, y over rows. Loops step by gridDim.
struct RowGrid {
  dim3 blocks;
  dim3 threads;
};

inline RowGrid row_grid(int64_t rows, int64_t quads) {
  unsigned along = 8;
  while (along < kThreads && along < quads) along *= 2;
  const unsigned across = kThreads / along;
  const int64_t x = (rows + across - 1) / across, y = (quads + along - 1) / along;
  constexpr int64_t kMostX = 1 << 20, kMostY = 64;
  return {dim3(static_cast<unsigned>(x < kMostX ? x : kMostX),
               static_cast<unsigned>(y < kMostY ? y : kMostY)),
          dim3(along, across)};
}

__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
__device__ __forceinline__ int64_t row_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.y;
}
__device__ __forceinline__ int64_t first_quad() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t quad_step() {
  return static_cast<int64_t>(gridDim.y) * blockDim.x;
}

}  // namespace subzero::cuda
