// A warp takes segments of rows, 4 kQuads elements each, in turn with all other warps. Its lanes
// look up 32 segments at a time and the warp works on those whose row has a scale, so a row without
// one costs a few instructions of one lane, and noisy rows find warps without work wherever they
// lie.
#include <numeric>

#include "batch.cuh"
#include "noise.cuh"
#include "storage.cuh"

namespace subzero::cuda {
namespace {

constexpr int kQuads = 256;  // blocks of the generator, of four elements, of a segment

// What a warp knows about the segment it works on: the same in all lanes.
struct Segment {
  int64_t offset;  // of its row in y
  uint64_t block;  // of the row's first element
  uint32_t phase;  // which of the block's four that is
  uint32_t draw;
  int64_t quad;  // the segment's first, counted from `block`
  float scale;
};

// Up to kVectors times 16 bytes in each lane: those of `data` with numbers lane, lane + 32, ...
// below `count`. `low` is the first one's block. kWhole: all of them are there.
template <class T, bool kWhole>
__device__ __forceinline__ void add_vectors(Bytes16* data, int count, uint32_t low, float scale,
                                            const RoundKeys& keys, const Blocks& blocks) {
  constexpr int kVec = 16 / sizeof(T), kEach = kVec / 4, kVectors = 16 / kVec;
  const int lane = threadIdx.x % 32;
  Bytes16 x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (kWhole || lane + 32 * v < count) x[v] = load16<LoadHint::streaming>(data + lane + 32 * v);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!kWhole && 32 * v >= count) break;
    float z[kVec];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const Normals normals = blocks.normals(keys, low + (lane + 32 * v) * kEach + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) z[4 * i + j] = normals.z[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (sizeof(T) == 4) {
        x[v].word[j] = float_bits(fma_(scale, z[j], bits_float(x[v].word[j])));
      } else {
        const float2 y = unpack(T{}, x[v].word[j]);
        x[v].word[j] = round_pair(T{}, fma_(scale, z[2 * j], y.x), fma_(scale, z[2 * j + 1], y.y));
      }
    }
    if (kWhole || lane + 32 * v < count) store16<StoreHint::streaming>(data + lane + 32 * v, x[v]);
  }
}

// 16 bytes at a time: rows begin at 16 bytes, and with a whole block.
template <class T>
__device__ __forceinline__ void add_segment(T* row, int64_t columns, const Segment& at,
                                            const RoundKeys& keys, const Blocks& blocks) {
  constexpr int kVec = 16 / sizeof(T), kEach = kVec / 4, kStep = 32 * 16 / kVec;
  auto* data = reinterpret_cast<Bytes16*>(row) + at.quad / kEach;
  auto low = static_cast<uint32_t>(at.block + static_cast<uint64_t>(at.quad));
  int count = static_cast<int>(min(columns / kVec - at.quad / kEach, int64_t{kQuads / kEach}));
#pragma unroll 1
  for (; count >= kStep; count -= kStep, data += kStep, low += kStep * kEach)
    add_vectors<T, true>(data, count, low, at.scale, keys, blocks);
  if (count > 0) add_vectors<T, false>(data, count, low, at.scale, keys, blocks);
}

// Element by element, wherever rows begin.
template <class T>
__device__ __forceinline__ void add_elements(T* row, int64_t columns, const Segment& at,
                                             const RoundKeys& keys, uint32_t stream) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < kQuads; i += 32) {
    const int64_t first = 4 * (at.quad + i) - at.phase;
    if (first >= columns) break;
    const uint64_t block = at.block + static_cast<uint64_t>(at.quad + i);
    const Blocks blocks(keys, stream, at.draw, static_cast<uint32_t>(block >> 32));
    const Normals normals = blocks.normals(keys, static_cast<uint32_t>(block));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first + j >= 0 && first + j < columns)
        round_nearest(fma_(at.scale, normals.z[j], to_float(row[first + j])), row[first + j]);
  }
}

__device__ __forceinline__ uint64_t from_lane(uint64_t value, int lane) {
  return __shfl_sync(~0u, static_cast<unsigned long long>(value), lane);
}

// Warp w takes the segments w, w + warps, ....
template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 3)
    add_noise_kernel(const __grid_constant__ AddNoise args, int64_t segments, int64_t warps) {
  const Slabs& y = args.y;
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (warp >= warps) return;
  const RoundKeys keys(static_cast<uint64_t>(args.rng[0]));
  const uint32_t draw = static_cast<uint32_t>(args.rng[1]);
  const int64_t rows = y.groups * y.rows, count = rows * segments;
  for (int64_t base = warp; base < count; base += 32 * warps) {
    const int64_t index = base + lane * warps, row = index / segments;
    Segment mine{};
    if (index < count) mine.scale = args.scale[row];
    if (mine.scale != 0.0f) {
      const int64_t g = row / y.rows, i = row % y.rows;
      const uint64_t first = static_cast<uint64_t>(args.row[i]) * static_cast<uint64_t>(y.columns);
      mine.offset = g * y.group_stride + i * y.row_stride;
      mine.block = first / 4, mine.phase = first % 4;
      mine.draw = draw + static_cast<uint32_t>(args.query[g]);
      mine.quad = index % segments * kQuads;
    }
    uint32_t noisy = __ballot_sync(~0u, mine.scale != 0.0f);
    while (noisy != 0) {
      const int from = __ffs(static_cast<int>(noisy)) - 1;
      noisy &= noisy - 1;
      Segment at;
      at.offset = static_cast<int64_t>(from_lane(static_cast<uint64_t>(mine.offset), from));
      at.block = from_lane(mine.block, from);
      at.phase = __shfl_sync(~0u, mine.phase, from);
      at.draw = __shfl_sync(~0u, mine.draw, from);
      at.quad = static_cast<int64_t>(from_lane(static_cast<uint64_t>(mine.quad), from));
      at.scale = __shfl_sync(~0u, mine.scale, from);
      T* const data = static_cast<T*>(y.data) + at.offset;
      const uint64_t block = at.block + static_cast<uint64_t>(at.quad);
      const auto high = static_cast<uint32_t>(block >> 32);
      if (kVectors && high == (block + kQuads - 1) >> 32)
        add_segment(data, y.columns, at, keys, Blocks(keys, args.stream, at.draw, high));
      else
        add_elements(data, y.columns, at, keys, args.stream);
    }
  }
}

template <class T>
void launch_add_noise(const AddNoise& args, const Launch& launch) {
  const Slabs& y = args.y;
  constexpr int64_t kVec = 16 / sizeof(T), kWarps = kThreads / 32;
  const bool vectors = y.columns % kVec == 0 && (y.groups == 1 || y.group_stride % kVec == 0) &&
                       (y.rows == 1 || y.row_stride % kVec == 0) &&
                       reinterpret_cast<uintptr_t>(y.data) % 16 == 0;
  const auto kernel = vectors ? add_noise_kernel<T, true> : add_noise_kernel<T, false>;
  // Where a row begins in the middle of a block it touches one more.
  const int64_t quads = vectors ? y.columns / 4 : (y.columns + 6) / 4;
  const int64_t segments = (quads + kQuads - 1) / kQuads, count = y.groups * y.rows * segments;
  const int64_t resident =
      resident_blocks(reinterpret_cast<const void*>(kernel), kThreads, 0, launch.device);
  const int64_t grid = std::min(resident, (count + kWarps - 1) / kWarps);
  // Rows are noisy at regular distances, often. A step without a divisor in common with them, most
  // likely, deals them out evenly.
  int64_t warps = grid * kWarps;
  while (std::gcd(warps, 30 * segments) != 1) --warps;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      args, segments, warps);
}

}  // namespace

Status add_noise_(const AddNoise& args, const Launch& launch) {
  const Slabs& y = args.y;
  if (y.groups * y.rows * y.columns == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  switch (y.dtype) {
    case Dtype::float32:
      launch_add_noise<float>(args, launch);
      break;
    case Dtype::bfloat16:
      launch_add_noise<bf16>(args, launch);
      break;
    case Dtype::float16:
      launch_add_noise<f16>(args, launch);
      break;
  }
  return status_of(cudaGetLastError());
}

}  // namespace subzero::cuda
