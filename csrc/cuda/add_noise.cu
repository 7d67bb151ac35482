#include "../dtypes.h"
#include "row_noise.cuh"

namespace subzero::cuda {
namespace {

template <class T>
__global__ void add_noise_kernel(AddNoise args) {
  const Slabs& y = args.y;
  const int64_t quads = quads_of_row(y.columns);
  for (int64_t item = first_row(); item < y.groups * y.rows; item += row_step()) {
    const float scale = args.scale[item];
    if (scale == 0.0f) continue;
    const int64_t g = item / y.rows, i = item % y.rows;
    const int64_t first = args.row[i] * y.columns;
    const NoiseSource source = noise_source(args.rng, args.stream, args.query[g]);
    T* const out = static_cast<T*>(y.data) + g * y.group_stride + i * y.row_stride;
    for (int64_t index = first_quad(); index < quads; index += quad_step()) {
      const Quad quad = quad_of_row(first, index);
      if (quad.column >= y.columns) break;
      const Normals normals = block_normals(source, quad.block);
      for (int j = 0; j < 4; ++j) {
        const int64_t column = quad.column + j;
        if (column >= 0 && column < y.columns)
          round_nearest(fma_(scale, normals.z[j], to_float(out[column])), out[column]);
      }
    }
  }
}

}  // namespace

Status add_noise_(const AddNoise& args, const Launch& launch) {
  const Slabs& y = args.y;
  if (y.groups * y.rows * y.columns == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto [blocks, threads] = row_grid(y.groups * y.rows, quads_of_row(y.columns));
  switch (y.dtype) {
    case Dtype::float32:
      add_noise_kernel<float><<<blocks, threads, 0, stream>>>(args);
      break;
    case Dtype::bfloat16:
      add_noise_kernel<bf16><<<blocks, threads, 0, stream>>>(args);
      break;
    case Dtype::float16:
      add_noise_kernel<f16><<<blocks, threads, 0, stream>>>(args);
      break;
  }
  return status_of(cudaGetLastError());
}

}  // namespace subzero::cuda
