// One launch for many tensors: their descriptions travel as a kernel parameter, by value, so that
// nothing is allocated or copied. A parameter holds 4 KiB; longer lists take several launches.
#pragma once

#include "launch.cuh"

namespace subzero::cuda {

template <class Item>
struct Batch {
  static constexpr int kMost = 32;
  Item items[kMost];
  int64_t ends[kMost];  // thread blocks up to and with each item's last
  int count;

  struct Place {
    int item;
    int64_t block;  // of the item
  };
  __device__ Place find(int64_t block) const {
    int i = 0;
    while (block >= ends[i]) ++i;
    return {i, i == 0 ? block : block - ends[i - 1]};
  }
};

// launch(batch, grid) for every kMost items; blocks(item) is the number of thread blocks it takes.
template <class Item, class Blocks, class Launcher>
cudaError_t for_each_batch(const Item* items, int64_t count, Blocks blocks, Launcher launch) {
  static_assert(sizeof(Batch<Item>) <= 4000, "kernel parameters end at 4 KiB");
  for (int64_t first = 0; first < count; first += Batch<Item>::kMost) {
    Batch<Item> batch{};
    int64_t total = 0;
    for (; batch.count < Batch<Item>::kMost && first + batch.count < count; ++batch.count) {
      const Item& item = batch.items[batch.count] = items[first + batch.count];
      batch.ends[batch.count] = total += blocks(item);
    }
    if (total == 0) continue;
    launch(batch, static_cast<unsigned>(total));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace subzero::cuda
