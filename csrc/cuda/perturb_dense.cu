#include "../dtypes.h"
#include "batch.cuh"

namespace subzero::cuda {
namespace {

// W += sum for the four elements from `first`, or as many as there are.
template <class T>
__device__ void add_quad(const Dense& item, const float* sum, int64_t first, bool stochastic,
                         const int64_t* rng) {
  const Matrix& w = item.w;
  const int64_t count = w.rows * w.columns;
  Words words{};
  if (stochastic)
    words = block_words(noise_source(rng, rounding_stream(item.stream)),
                        static_cast<uint64_t>(first) / 4);
  const bool one_run = w.rows == 1 || w.stride == w.columns;
  for (int j = 0; j < 4 && first + j < count; ++j) {
    const int64_t element = first + j;
    const int64_t at = one_run ? element : element / w.columns * w.stride + element % w.columns;
    T& out = static_cast<T*>(w.data)[at];
    const float value = to_float(out) + sum[j];
    if (stochastic)
      round_stochastic(value, words.w[j], out);
    else
      round_nearest(value, out);
  }
}

// One block of the generator, four neighbouring elements, per thread.
__global__ void perturb_dense_kernel(const __grid_constant__ Batch<Dense> batch, Queries queries,
                                     Rounding rounding) {
  const auto place = batch.find(blockIdx.x);
  const Dense& item = batch.items[place.item];
  const int64_t block = place.block * blockDim.x + threadIdx.x;
  if (4 * block >= item.w.rows * item.w.columns) return;
  float sum[4] = {};
  for (int64_t k = 0; k < queries.count; ++k) {
    const float coeff = queries.coeff[k];
    if (coeff == 0.0f) continue;
    const Normals normals =
        block_normals(noise_source(queries.rng, item.stream, k), static_cast<uint64_t>(block));
    for (int j = 0; j < 4; ++j) sum[j] = fma_(coeff, normals.z[j], sum[j]);
  }
  const bool stochastic = rounding == Rounding::stochastic;
  switch (item.w.dtype) {
    case Dtype::float32:
      return add_quad<float>(item, sum, 4 * block, false, queries.rng);
    case Dtype::bfloat16:
      return add_quad<bf16>(item, sum, 4 * block, stochastic, queries.rng);
    case Dtype::float16:
      return add_quad<f16>(item, sum, 4 * block, stochastic, queries.rng);
  }
}

}  // namespace

Status perturb_dense_(const PerturbDense& args, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto blocks = [](const Dense& item) {
    constexpr int64_t kElements = 4 * kThreads;
    return (item.w.rows * item.w.columns + kElements - 1) / kElements;
  };
  return status_of(
      for_each_batch(args.items, args.count, blocks, [&](const Batch<Dense>& batch, unsigned grid) {
        perturb_dense_kernel<<<grid, kThreads, 0, stream>>>(batch, args.queries, args.rounding);
      }));
}

}  // namespace subzero::cuda
