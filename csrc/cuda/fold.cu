#include "lowrank_update.cuh"

namespace subzero::cuda {

Status LowRankPlan::fold_(const Fold& args, void* scratch, const Launch& launch) const {
  UpdateCall call{};
  call.cores = args.core;
  call.rng = args.rng;
  call.decay = static_cast<float>(args.decay);
  if (args.item.w.dtype == Dtype::float32)
    call.decay_rest = static_cast<float>(args.decay - static_cast<double>(call.decay));
  call.stochastic = args.rounding == Rounding::stochastic;
  return plan_->run(call, scratch, static_cast<cudaStream_t>(launch.stream));
}

}  // namespace subzero::cuda
