#include "../philox.h"
#include "launch.cuh"

namespace subzero::cuda {
namespace {

__global__ void philox4x32_kernel(Philox4x32 args) {
  const uint32_t key0 = static_cast<uint32_t>(args.key[0]);
  const uint32_t key1 = static_cast<uint32_t>(args.key[1]);
  for (int64_t i = first_item(); i < args.count; i += item_step()) {
    const int64_t* const c = args.counter + 4 * i;
    const Words words = philox4x32_10({{static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]),
                                        static_cast<uint32_t>(c[2]), static_cast<uint32_t>(c[3])}},
                                      key0, key1);
    for (int j = 0; j < 4; ++j) args.words[4 * i + j] = words.w[j];
  }
}

}  // namespace

Status philox4x32(const Philox4x32& args, const Launch& launch) {
  if (args.count == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  philox4x32_kernel<<<grid_for(args.count), kThreads, 0, stream>>>(args);
  return status_of(cudaGetLastError());
}

}  // namespace subzero::cuda
