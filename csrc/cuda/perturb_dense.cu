#include "dense.cuh"

namespace subzero::cuda {
namespace {

template <class T>
Status perturb(const std::vector<DenseItem>& items, const PerturbDense& args,
               const Launch& launch) {
  if constexpr (sizeof(T) == 2)
    if (args.rounding == Rounding::stochastic)
      return launch_dense<T, DenseMode::stochastic>(items, args.queries, launch);
  return launch_dense<T, DenseMode::nearest>(items, args.queries, launch);
}

}  // namespace

Status perturb_dense_(const PerturbDense& args, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  std::vector<DenseItem> items[3];  // by Dtype
  for (int64_t i = 0; i < args.count; ++i) {
    const Matrix& w = args.items[i].w;
    if (w.rows * w.columns > 0)
      items[static_cast<int>(w.dtype)].push_back(dense_item(w, args.items[i].stream));
  }
  Status status = perturb<float>(items[static_cast<int>(Dtype::float32)], args, launch);
  if (status.ok) status = perturb<bf16>(items[static_cast<int>(Dtype::bfloat16)], args, launch);
  if (status.ok) status = perturb<f16>(items[static_cast<int>(Dtype::float16)], args, launch);
  return status;
}

}  // namespace subzero::cuda
