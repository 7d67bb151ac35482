#include "../philox.h"
#include "batch.cuh"

namespace subzero::cuda {
namespace {

SUBZERO_HD int64_t quads_of_core(const Core& item) {
  return (item.rank * item.rank + 3) / 4;
}

// One block of the generator, four neighbouring elements of one group's core, per thread; a query
// without a coefficient in that group is not drawn. With one group `out` may be `base`: a thread
// reads what it writes, and nothing else.
__global__ void core_noise_kernel(const __grid_constant__ Batch<Core> batch, int64_t groups,
                                  Queries queries) {
  const auto place = batch.find(blockIdx.x);
  const Core& item = batch.items[place.item];
  const int64_t quads = quads_of_core(item), size = item.rank * item.rank;
  const int64_t index = place.block * blockDim.x + threadIdx.x;
  if (index >= groups * quads) return;
  const int64_t group = index / quads, block = index % quads;
  const float* const coeff = queries.coeff + group * queries.count;
  float sum[4] = {};
  for (int64_t k = 0; k < queries.count; ++k) {
    const float c = coeff[k];
    if (c == 0.0f) continue;
    const Normals normals =
        block_normals(noise_source(queries.rng, item.stream, k), static_cast<uint64_t>(block));
    for (int j = 0; j < 4; ++j) sum[j] = fma_(c, normals.z[j], sum[j]);
  }
  float* const out = item.out + group * size;
  for (int j = 0; j < 4; ++j) {
    const int64_t element = 4 * block + j;
    if (element < size) out[element] = fma_(item.mu, sum[j], item.base[element]);
  }
}

}  // namespace

Status core_noise_(const CoreNoise& args, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto blocks = [&](const Core& item) {
    return (args.groups * quads_of_core(item) + kThreads - 1) / kThreads;
  };
  return status_of(
      for_each_batch(args.items, args.count, blocks, [&](const Batch<Core>& batch, unsigned grid) {
        core_noise_kernel<<<grid, kThreads, 0, stream>>>(batch, args.groups, args.queries);
      }));
}

}  // namespace subzero::cuda
