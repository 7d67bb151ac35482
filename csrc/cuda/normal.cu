#include "../dtypes.h"
#include "launch.cuh"

namespace subzero::cuda {
namespace {

// Four elements of T that one thread writes at once.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T value[4];
};

// One block of the generator, four neighbouring elements, per thread and turn. `kWhole`: out is
// one run of memory that a Quad can be stored to; otherwise each element finds its own row.
template <class T, bool kWhole>
__global__ void normal_kernel(Matrix out, const int64_t* rng, uint32_t stream) {
  const NoiseSource source = noise_source(rng, stream);
  T* const data = static_cast<T*>(out.data);
  const int64_t count = out.rows * out.columns;
  const int64_t blocks = (count + 3) / 4;
  for (int64_t block = first_item(); block < blocks; block += item_step()) {
    const Normals normals = block_normals(source, static_cast<uint64_t>(block));
    const int64_t first = 4 * block;
    if (kWhole && first + 4 <= count) {
      Quad<T> quad;
      for (int j = 0; j < 4; ++j) round_nearest(normals.z[j], quad.value[j]);
      *reinterpret_cast<Quad<T>*>(data + first) = quad;
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      const int64_t element = first + j;
      if (element >= count) break;
      const int64_t row = element / out.columns, column = element % out.columns;
      round_nearest(normals.z[j], data[row * out.stride + column]);
    }
  }
}

template <class T>
void launch_normal(const Normal& args, cudaStream_t stream) {
  const int64_t count = args.out.rows * args.out.columns;
  const unsigned grid = grid_for((count + 3) / 4);
  const bool one_run = args.out.rows == 1 || args.out.stride == args.out.columns;
  const bool aligned = reinterpret_cast<uintptr_t>(args.out.data) % sizeof(Quad<T>) == 0;
  if (one_run && aligned)
    normal_kernel<T, true><<<grid, kThreads, 0, stream>>>(args.out, args.rng, args.stream);
  else
    normal_kernel<T, false><<<grid, kThreads, 0, stream>>>(args.out, args.rng, args.stream);
}

}  // namespace

Status normal_(const Normal& args, const Launch& launch) {
  if (args.out.rows * args.out.columns == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  switch (args.out.dtype) {
    case Dtype::float32:
      launch_normal<float>(args, stream);
      break;
    case Dtype::bfloat16:
      launch_normal<bf16>(args, stream);
      break;
    case Dtype::float16:
      launch_normal<f16>(args, stream);
      break;
  }
  return status_of(cudaGetLastError());
}

}  // namespace subzero::cuda
