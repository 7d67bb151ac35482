// W = decay W + U C V^T for many matrices in one launch and one pass over each W: what perturb_ and
// fold_ share. This file is what the host (lowrank_update.cu) and the kernel (lowrank_kernel.cuh)
// agree on.
#pragma once

#include <memory>
#include <vector>

#include "launch.cuh"

namespace subzero::cuda {

// The highest rank there are kernels for.
constexpr int64_t kMostRank = 256;
// Strips of 16 rows and columns of P that a thread block makes at a time.
constexpr int kLeftWarps = 8;
constexpr int kLeftPanel = 32;

// One matrix, or some of its rows. Thread blocks take chunks of columns and, of their tiles of
// rows, every so many-th.
struct UpdateItem {
  void* w;
  const void* u;
  const void* v;
  int64_t rows;       // m'
  int64_t columns;    // n'
  int64_t w_columns;  // 0, or the length of W's rows where they are not the rows of (m', n')
  int64_t w_stride;   // elements from row to row: of (m', n'), or of W itself if w_columns
  int64_t u_stride;
  int64_t v_stride;
  int64_t first;    // row-major index of the first element in the whole matrix
  uint32_t left;    // where P begins in UpdateCall::left
  uint32_t core;    // where its core begins in UpdateCall::cores
  uint32_t chunks;  // of columns
  uint32_t phases;  // of tiles of rows
  uint32_t stream;
  float mu;
  uint16_t rank;
  uint16_t tiles;       // of a band, below each other
  uint8_t steps;        // of 16 ranks
  uint8_t across;       // 2^across warps lie beside each other
  uint8_t strip;        // operands A of a strip: parts times steps
  bool u_wide, v_wide;  // in fp32

  // Of P's columns.
  __host__ __device__ int panels() const { return steps > 1 ? steps * 16 / kLeftPanel : 1; }
};

// The matrices of one launch, a kernel parameter.
template <int kMost>
struct UpdateBatch {
  UpdateItem items[kMost];
  uint32_t first_unit[kMost];   // thread block of W's kernel
  uint32_t first_block[kMost];  // of P's
  int32_t left_turns;           // times kLeftWarps strips to a block of P's
  int32_t count;

  // The item that a thread block works on.
  __device__ int find(const uint32_t (&first)[kMost], uint32_t block) const {
    int low = 0, high = count;  // first[low] <= block < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= block)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

// What changes from call to call.
struct UpdateCall {
  const float* cores;  // C of each item, (rank, rank); null: made from the three below
  const float* coeff;
  int64_t queries;
  const int64_t* rng;
  float decay;
  float decay_rest;  // what fp32 loses of it, for fp32 weights
  bool stochastic;
  uint4* left;  // P of all items, 16 bytes a lane
};

// Kernel parameters end at 4 KiB where either the compiler or the GPU is older, else at 32,764
// bytes. The smaller batch is also the faster to launch.
constexpr int kFewItems = 30;
constexpr int kManyItems = CUDART_VERSION >= 12010 ? 252 : kFewItems;
using FewItems = UpdateBatch<kFewItems>;
using ManyItems = UpdateBatch<kManyItems>;
static_assert(sizeof(FewItems) + sizeof(UpdateCall) <= 4096, "a parameter too large");
static_assert(sizeof(ManyItems) + sizeof(UpdateCall) <= 32764, "a parameter too large");

// The compiled kernels, for lists of either length, and the shape of their thread blocks.
struct UpdateKernel {
  const void* few;  // may be null
  const void* many;
  const void* left_few;
  const void* left_many;
  int warps;
  int columns;   // of a warp
  int resident;  // thread blocks on a multiprocessor
  int stages;
  int fixed_bytes;  // of shared memory, beside P
  int parts;        // of P
  bool scaled;      // each strip of P ends in 16 bytes more: what it is to be multiplied by
};

enum class Access { nearest, stochastic, elements };

// The kernel for W of dtype W, ranks up to kRank, and bases of W's dtype or (`wide`) where one of
// them is in fp32. Access: 16 bytes of W at a time with either rounding, or element by element with
// both. Each pair of W and kRank is compiled by itself (lowrank_kernels.cu).
template <class W, int kRank>
UpdateKernel update_kernel(bool wide, Access access);

// Where to launch. `overlap`: kernels wait for the one before them themselves (instructions.cuh),
// so that starting one hides behind the end of the other.
struct Place {
  cudaStream_t stream;
  bool overlap;
};

cudaError_t launch_kernel(const void* kernel, dim3 blocks, int threads, int shared_bytes,
                          void** arguments, const Place& place);

// One launch: a kernel, by either rounding, and what it works on.
struct UpdateLaunch {
  UpdateKernel kernel[2];  // by Rounding
  std::shared_ptr<const FewItems> few;
  std::shared_ptr<const ManyItems> many;  // one of the two
  int64_t count;
  uint32_t units;       // thread blocks of W's kernel
  uint32_t blocks;      // of P's
  int shared_bytes;     // of W's kernel
  int64_t left_bytes;   // P of all items
  int64_t core_floats;  // of all items
  int most_rank;

  // As a kernel's argument.
  void* batch() const {
    const void* const items = few ? static_cast<const void*>(few.get()) : many.get();
    return const_cast<void*>(items);
  }
};

// Matrices sorted into launches by dtype, rank and alignment, for calls that repeat. Usually that
// is one launch, after one for P; an element's bits depend on its own matrix alone.
class UpdatePlan {
 public:
  Status prepare(const LowRank* items, int64_t count, int device);

  // Bytes of scratch that P takes, and the cores for `queries` queries (0: they are given) where
  // thread blocks do not make their own: of one launch, they take turns. Never more than 1 MiB and
  // the bytes of U together.
  int64_t scratch_bytes(int64_t queries) const;

  // With `call.cores` null C is the noise of perturb_.
  Status run(UpdateCall call, void* scratch, cudaStream_t stream) const;

 private:
  // Whether P's thread blocks make their own core: where they are few, or it is little work.
  bool own_cores(const UpdateLaunch& launch, int64_t queries) const;

  std::vector<UpdateLaunch> launches_;
  int device_ = 0;
  int processors_ = 0;
  bool overlap_ = false;
};

// The cores of a launch's items from their noise, one after another (perturb.cu).
cudaError_t make_cores(const UpdateLaunch& launch, const UpdateCall& call, float* cores,
                       const Place& place);

}  // namespace subzero::cuda
