#include "batch.cuh"
#include "noise.cuh"

namespace subzero::cuda {
namespace {

SUBZERO_HD int64_t quads_of_core(const Core& item) {
  return (item.rank * item.rank + 3) / 4;
}

SUBZERO_HD int64_t pieces_of_core(const Core& item) {
  return (quads_of_core(item) + kThreads - 1) / kThreads;
}

// One block of the generator, four neighbouring elements, per thread, for two groups, which are
// often the two signs of one query; a query without a coefficient in either is not drawn. With one
// group `out` may be `base`: a thread reads what it writes, and nothing else.
template <class Batch>
__global__ void core_noise_kernel(const __grid_constant__ Batch batch, int64_t groups,
                                  const __grid_constant__ Queries queries) {
  const int index = batch.find(blockIdx.x);
  const Core& item = batch.items[index];
  const int64_t pieces = pieces_of_core(item), piece = blockIdx.x - batch.first[index];
  const int64_t pair = piece / pieces, size = item.rank * item.rank;
  const int64_t block = piece % pieces * kThreads + threadIdx.x;
  const int lane = threadIdx.x % 32, both = 2 * pair + 1 < groups ? 2 : 1;
  const RoundKeys keys(static_cast<uint64_t>(queries.rng[0]));
  const uint32_t draw = static_cast<uint32_t>(queries.rng[1]);
  const float* const coeff = queries.coeff + 2 * pair * queries.count;
  float sum[2][4] = {};
  for (int64_t first = 0; first < queries.count; first += 32) {
    // A lane for each query; then all lanes together on those that have a coefficient.
    const int64_t k = first + lane;
    const float mine[2] = {k < queries.count ? coeff[k] : 0.0f,
                           k < queries.count && both == 2 ? coeff[k + queries.count] : 0.0f};
    uint32_t drawn = __ballot_sync(~0u, mine[0] != 0.0f || mine[1] != 0.0f);
    while (drawn != 0) {
      const int from = __ffs(static_cast<int>(drawn)) - 1;
      drawn &= drawn - 1;
      const Blocks blocks(keys, item.stream, draw + static_cast<uint32_t>(first + from),
                          static_cast<uint32_t>(block >> 32));
      const Normals normals = blocks.normals(keys, static_cast<uint32_t>(block));
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float c = __shfl_sync(~0u, mine[g], from);
        if (c == 0.0f) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[g][j] = fma_(c, normals.z[j], sum[g][j]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    if (g == both) break;
    float* const out = item.out + (2 * pair + g) * size;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t element = 4 * block + j;
      if (element < size) out[element] = fma_(item.mu, sum[g][j], item.base[element]);
    }
  }
}

}  // namespace

Status core_noise_(const CoreNoise& args, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto pieces = [&](const Core& item) {
    return pieces_of_core(item) * ((args.groups + 1) / 2);
  };
  return for_each_batch(args.items, args.count, pieces, [&](const auto& batch) {
    core_noise_kernel<<<batch.pieces, kThreads, 0, stream>>>(batch, args.groups, args.queries);
  });
}

}  // namespace subzero::cuda
