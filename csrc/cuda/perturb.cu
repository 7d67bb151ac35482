// perturb_ and perturb_many_: the noise of their cores, and the update (lowrank_update.cu).
#include "lowrank_core.cuh"

namespace subzero::cuda {
namespace {

// One block of the generator per thread: blockIdx.y is the item.
template <class Batch>
__global__ void core_sum_kernel(const __grid_constant__ Batch batch,
                                const __grid_constant__ UpdateCall call, float* cores) {
  // In this order: whatever starts after may rely on what this kernel waited for.
  wait_for_launch_before();
  allow_launch_after();
  const UpdateItem& item = batch.items[blockIdx.y];
  const int size = item.rank * item.rank;
  float* const core = cores + item.core;
  const int step = static_cast<int>(gridDim.x * blockDim.x);
  for (int quad = static_cast<int>(first_item()); 4 * quad < size; quad += step) {
    Normals value[1];
    core_quads(item, call, {static_cast<uint32_t>(quad)}, value);
    for (int j = 0; j < 4 && 4 * quad + j < size; ++j) core[4 * quad + j] = value[0].z[j];
  }
}

}  // namespace

cudaError_t make_cores(const UpdateLaunch& launch, const UpdateCall& call, float* cores,
                       const Place& place) {
  const int quads = (launch.most_rank * launch.most_rank + 3) / 4;
  const dim3 blocks(static_cast<unsigned>((quads + kThreads - 1) / kThreads),
                    static_cast<unsigned>(launch.count));
  const void* const kernel = launch.few
                                 ? reinterpret_cast<const void*>(&core_sum_kernel<FewItems>)
                                 : reinterpret_cast<const void*>(&core_sum_kernel<ManyItems>);
  void* arguments[] = {launch.batch(), const_cast<UpdateCall*>(&call), &cores};
  return launch_kernel(kernel, blocks, kThreads, 0, arguments, place);
}

Status LowRankPlan::perturb_(const Queries& queries, Rounding rounding, void* scratch,
                             const Launch& launch) const {
  UpdateCall call{};
  call.coeff = queries.coeff, call.queries = queries.count, call.rng = queries.rng;
  call.decay = 1.0f;
  call.stochastic = rounding == Rounding::stochastic;
  return plan_->run(call, scratch, static_cast<cudaStream_t>(launch.stream));
}

}  // namespace subzero::cuda
