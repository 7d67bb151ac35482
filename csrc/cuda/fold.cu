#include "lowrank_update.cuh"

namespace subzero::cuda {

Status fold_(const Fold& args, const Launch& launch) {
  UpdatePlan plan;
  const Status status = plan.prepare(&args.item, 1, launch.device);
  if (!status.ok) return status;
  UpdateCall call{};
  call.cores = args.core;
  call.rng = args.rng;
  call.decay = static_cast<float>(args.decay);
  if (args.item.w.dtype == Dtype::float32)
    call.decay_rest = static_cast<float>(args.decay - static_cast<double>(call.decay));
  call.stochastic = args.rounding == Rounding::stochastic;
  return plan.run(call, nullptr, static_cast<cudaStream_t>(launch.stream));
}

}  // namespace subzero::cuda
