#include "launch.cuh"
#include "noise.cuh"

namespace subzero::cuda {
namespace {

// Four words in 64 bits each, as a thread reads or writes them. Tensors of 64-bit numbers may begin
// at any 8 bytes.
template <bool kAligned>
struct alignas(kAligned ? 16 : 8) Words64 {
  uint64_t w[4];
};

template <bool kAligned>
__global__ void philox4x32_kernel(Philox4x32 args) {
  const RoundKeys keys(static_cast<uint32_t>(args.key[0]) | static_cast<uint64_t>(args.key[1])
                                                                << 32);
  const auto* const counter = reinterpret_cast<const Words64<kAligned>*>(args.counter);
  auto* const words = reinterpret_cast<Words64<kAligned>*>(args.words);
  for (int64_t i = first_item(); i < args.count; i += item_step()) {
    const Words64<kAligned> c = counter[i];
    const Blocks blocks(keys, static_cast<uint32_t>(c.w[2]), static_cast<uint32_t>(c.w[3]),
                        static_cast<uint32_t>(c.w[1]));
    const Words word = blocks.words(keys, static_cast<uint32_t>(c.w[0]));
    words[i] = {{word.w[0], word.w[1], word.w[2], word.w[3]}};
  }
}

}  // namespace

Status philox4x32(const Philox4x32& args, const Launch& launch) {
  if (args.count == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto both =
      reinterpret_cast<uintptr_t>(args.counter) | reinterpret_cast<uintptr_t>(args.words);
  const auto kernel = both % 16 == 0 ? philox4x32_kernel<true> : philox4x32_kernel<false>;
  kernel<<<grid_for(args.count), kThreads, 0, stream>>>(args);
  return status_of(cudaGetLastError());
}

}  // namespace subzero::cuda
