#include "dense.cuh"

namespace subzero::cuda {

Status normal_(const Normal& args, const Launch& launch) {
  if (args.out.rows * args.out.columns == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const std::vector<DenseItem> items{dense_item(args.out, args.stream)};
  const Queries queries{nullptr, 1, args.rng};
  switch (args.out.dtype) {
    case Dtype::bfloat16:
      return launch_dense<bf16, DenseMode::fill>(items, queries, launch);
    case Dtype::float16:
      return launch_dense<f16, DenseMode::fill>(items, queries, launch);
    default:
      return launch_dense<float, DenseMode::fill>(items, queries, launch);
  }
}

}  // namespace subzero::cuda
