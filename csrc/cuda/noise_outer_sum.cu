// The weighted noise of some rows, for a noise_outer_ too wide for its kernel: torch's GEMM does
// the rest.
#include "noise.cuh"
#include "row_noise.cuh"

namespace subzero::cuda {
namespace {

__global__ void noise_outer_sum_kernel(NoiseOuterSum args) {
  const RoundKeys keys(static_cast<uint64_t>(args.queries.rng[0]));
  const uint32_t draw = static_cast<uint32_t>(args.queries.rng[1]);
  const int64_t quads = quads_of_row(args.columns);
  for (int64_t i = first_row(); i < args.rows; i += row_step()) {
    const int64_t first = args.row[i] * args.columns;
    const float* const weights = args.queries.coeff + i;
    float* const out = args.sum + i * args.columns;
    for (int64_t index = first_quad(); index < quads; index += quad_step()) {
      const Quad quad = quad_of_row(first, index);
      if (quad.column >= args.columns) break;
      float sum[4] = {};
      for (int64_t k = 0; k < args.queries.count; ++k) {
        const float weight = weights[k * args.weight_stride];
        if (weight == 0.0f) continue;
        const Blocks blocks(keys, args.stream, draw + static_cast<uint32_t>(k),
                            static_cast<uint32_t>(quad.block >> 32));
        const Normals normals = blocks.normals(keys, static_cast<uint32_t>(quad.block));
        for (int j = 0; j < 4; ++j) sum[j] = fma_(weight, normals.z[j], sum[j]);
      }
      for (int j = 0; j < 4; ++j) {
        const int64_t column = quad.column + j;
        if (column >= 0 && column < args.columns) out[column] = sum[j];
      }
    }
  }
}

}  // namespace

Status noise_outer_sum(const NoiseOuterSum& args, const Launch& launch) {
  if (args.rows * args.columns == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto [blocks, threads] = row_grid(args.rows, quads_of_row(args.columns));
  noise_outer_sum_kernel<<<blocks, threads, 0, stream>>>(args);
  return status_of(cudaGetLastError());
}

}  // namespace subzero::cuda
