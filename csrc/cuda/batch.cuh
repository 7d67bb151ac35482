// One launch for many tensors: their descriptions travel as a kernel parameter, by value, so that
// nothing is allocated or copied. Longer lists take several launches.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace subzero::cuda {

// Kernel parameters end at 4 KiB where the compiler is older, else at 32,764 bytes. The smaller
// list is also the faster to launch. The rest is for a kernel's other parameters.
constexpr int kFewBytes = 4096 - 96;
constexpr int kManyBytes = CUDART_VERSION >= 12010 ? 32764 - 96 : kFewBytes;

template <class Item, int kBytes>
struct Batch {
  static constexpr int kMost = (kBytes - 16) / static_cast<int>(sizeof(Item) + 4);
  Item items[kMost];
  uint32_t first[kMost];  // each item's first piece of work
  int32_t count;
  uint32_t pieces;  // of all items

  // The item that a piece belongs to, which may well be `guess`.
  __device__ __forceinline__ int find(uint32_t piece, int guess = 0) const {
    int low = first[guess] <= piece ? guess : 0, high = count;  // first[low] <= piece < first[high]
    if (low + 1 == high || first[low + 1] > piece) return low;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= piece)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

template <class Item>
using FewItemsOf = Batch<Item, kFewBytes>;
template <class Item>
using ManyItemsOf = Batch<Item, kManyBytes>;

// launch(batch) for every Batch::kMost items; pieces(item) is how much work it is.
template <class Batch, class Item, class Pieces, class Launcher>
Status for_each_batch(const Item* items, int64_t count, Pieces pieces, Launcher launch) {
  for (int64_t first = 0; first < count; first += Batch::kMost) {
    Batch batch;
    batch.count = static_cast<int32_t>(std::min<int64_t>(Batch::kMost, count - first));
    int64_t total = 0;
    for (int32_t i = 0; i < batch.count; ++i) {
      batch.items[i] = items[first + i];
      batch.first[i] = static_cast<uint32_t>(total);
      total += pieces(batch.items[i]);
      if (total > INT32_MAX) return failure("too many elements for one launch");
    }
    if (total == 0) continue;
    batch.pieces = static_cast<uint32_t>(total);
    launch(batch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return status_of(error);
  }
  return Status{};
}

// The same with the shorter list where it is long enough.
template <class Item, class Pieces, class Launcher>
Status for_each_batch(const Item* items, int64_t count, Pieces pieces, Launcher launch) {
  if (count <= FewItemsOf<Item>::kMost)
    return for_each_batch<FewItemsOf<Item>>(items, count, pieces, launch);
  return for_each_batch<ManyItemsOf<Item>>(items, count, pieces, launch);
}

// Thread blocks of `threads` that a device runs at once, for grids that stay; at least 1.
inline int64_t resident_blocks(const void* kernel, int threads, int shared_bytes, int device) {
  int processors = 0, each = 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &each, kernel, threads, static_cast<size_t>(shared_bytes)) != cudaSuccess)
    return 1;  // the launch will tell
  return std::max<int64_t>(1, int64_t{processors} * each);
}

}  // namespace subzero::cuda
