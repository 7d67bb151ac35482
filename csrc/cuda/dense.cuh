// Noise for every element of many tensors in one launch: what normal_ and perturb_dense_ share.
//
// A tensor is cut into tiles of kTile elements, each thread taking 16 bytes here and there. Memory
// is asked for before the noise is made, several blocks of the generator are under way in a thread,
// and thread blocks stay for many tiles, so that reading rng, finding the tensor and preparing the
// generator cost next to nothing.
#pragma once

#include <vector>

#include "batch.cuh"
#include "noise.cuh"
#include "storage.cuh"

namespace subzero::cuda {

enum class DenseMode { fill, nearest, stochastic };

struct DenseItem {
  void* data;
  int64_t count;
  int64_t columns;  // 0: one run of memory whose start is aligned to 16 bytes
  int64_t stride;
  uint32_t stream;
};

inline DenseItem dense_item(const Matrix& w, uint32_t stream) {
  const bool whole =
      (w.rows == 1 || w.stride == w.columns) && reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
  return {w.data, w.rows * w.columns, whole ? 0 : w.columns, w.stride, stream};
}

constexpr int kTile = 16 * kThreads;
constexpr int64_t kMostTiles = 16;  // of a chunk; a power of two, as 2^32 blocks hold whole chunks

// What a kernel knows about one tensor and `high`, the upper half of its blocks' numbers.
struct DenseNoise {
  const RoundKeys& keys;
  const Queries& queries;
  uint32_t stream, draw, high;
  float coeff;   // of query 0
  Blocks first;  // of query 0
  Blocks rounding;

  __device__ __forceinline__ DenseNoise(const RoundKeys& keys, const Queries& queries,
                                        uint32_t stream, uint32_t draw, uint32_t high, float coeff)
      : keys(keys),
        queries(queries),
        stream(stream),
        draw(draw),
        high(high),
        coeff(coeff),
        first(keys, stream, draw, high),
        rounding(keys, rounding_stream(stream), draw, high) {}

  // sum_k coeff[k] z_(draw + k) of kQuads blocks, or z itself.
  template <DenseMode kMode, int kQuads>
  __device__ __forceinline__ void sum(const uint32_t (&low)[kQuads],
                                      float (&out)[4 * kQuads]) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const Normals normals = first.normals(keys, low[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[4 * i + j] = kMode == DenseMode::fill ? normals.z[j] : fma_(coeff, normals.z[j], 0.0f);
    }
    if constexpr (kMode != DenseMode::fill) {
#pragma unroll 1
      for (int64_t k = 1; k < queries.count; ++k) {
        const float next = queries.coeff[k];
        if (next == 0.0f) continue;
        const Blocks blocks(keys, stream, draw + static_cast<uint32_t>(k), high);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          const Normals normals = blocks.normals(keys, low[i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) out[4 * i + j] = fma_(next, normals.z[j], out[4 * i + j]);
        }
      }
    }
  }
};

// A tile that lies in one aligned run of memory; `low` is its first block.
template <class T, DenseMode kMode>
__device__ __forceinline__ void whole_tile(T* data, uint32_t low, const DenseNoise& noise) {
  constexpr int kVec = 16 / sizeof(T), kVectors = 16 / kVec, kQuads = kVec / 4;
  Bytes16* const at = reinterpret_cast<Bytes16*>(data) + threadIdx.x;
  Bytes16 old[kVectors];
  uint32_t block[4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (kMode != DenseMode::fill) old[v] = load16<LoadHint::streaming>(at + v * kThreads);
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      block[v * kQuads + i] = low + (threadIdx.x + v * kThreads) * kQuads + i;
  }
  float sum[16];
  noise.template sum<kMode>(block, sum);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float* const added = sum + v * kVec;
    Bytes16 x;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x.word[j] =
            float_bits(kMode == DenseMode::fill ? added[j] : bits_float(old[v].word[j]) + added[j]);
    } else {
      uint32_t words[kVec];
      if constexpr (kMode == DenseMode::stochastic) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          const Words w = noise.rounding.words(noise.keys, block[v * kQuads + i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) words[4 * i + j] = w.w[j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 value = make_float2(added[2 * j], added[2 * j + 1]);
        if constexpr (kMode != DenseMode::fill) {
          const float2 w = unpack(T{}, old[v].word[j]);
          value.x = w.x + value.x, value.y = w.y + value.y;
        }
        x.word[j] = kMode == DenseMode::stochastic
                        ? round_pair(T{}, value.x, value.y, words[2 * j], words[2 * j + 1])
                        : round_pair(T{}, value.x, value.y);
      }
    }
    store16<StoreHint::streaming>(at + v * kThreads, x);
  }
}

// Elements first .. first + count, at most a tile, wherever they lie.
template <class T, DenseMode kMode>
__device__ __forceinline__ void any_tile(const DenseItem& item, int64_t first, int count,
                                         uint32_t low, const DenseNoise& noise) {
  for (int at = 4 * static_cast<int>(threadIdx.x); at < count; at += 4 * kThreads) {
    const uint32_t block[1] = {low + at / 4};
    float sum[4];
    noise.template sum<kMode>(block, sum);
    Words words{};
    if (kMode == DenseMode::stochastic) words = noise.rounding.words(noise.keys, block[0]);
    const int64_t columns = item.columns == 0 ? item.count : item.columns;
    int64_t row = (first + at) / columns, column = (first + at) % columns;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (at + j >= count) break;
      T& out = static_cast<T*>(item.data)[row * item.stride + column];
      const float value = kMode == DenseMode::fill ? sum[j] : to_float(out) + sum[j];
      if (kMode == DenseMode::stochastic)
        round_stochastic(value, words.w[j], out);
      else
        round_nearest(value, out);
      if (++column == columns) column = 0, ++row;
    }
  }
}

// Thread blocks take chunks of `tiles` tiles in turn.
template <class T, DenseMode kMode, class Batch>
__global__ void __launch_bounds__(kThreads, 3)
    dense_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Queries queries,
                 uint32_t tiles) {
  const RoundKeys keys(static_cast<uint64_t>(queries.rng[0]));
  const uint32_t draw = static_cast<uint32_t>(queries.rng[1]);
  const float coeff = kMode == DenseMode::fill ? 1.0f : queries.coeff[0];
  int index = 0;
  for (uint32_t chunk = blockIdx.x; chunk < batch.pieces; chunk += gridDim.x) {
    index = batch.find(chunk, index);
    const DenseItem& item = batch.items[index];
    int64_t first = int64_t{chunk - batch.first[index]} * tiles * kTile;
    const int64_t end = min(first + int64_t{tiles} * kTile, item.count);
    const auto block = static_cast<uint64_t>(first) / 4;
    uint32_t low = static_cast<uint32_t>(block);
    const DenseNoise noise(keys, queries, item.stream, draw, static_cast<uint32_t>(block >> 32),
                           coeff);
    if (item.columns == 0) {
      T* data = static_cast<T*>(item.data) + first;
      const int whole = static_cast<int>(end - first) / kTile;
#pragma unroll 1
      for (int tile = 0; tile < whole; ++tile, data += kTile, low += kTile / 4)
        whole_tile<T, kMode>(data, low, noise);
      first += int64_t{whole} * kTile;
    }
#pragma unroll 1
    for (; first < end; first += kTile, low += kTile / 4)
      any_tile<T, kMode>(item, first, static_cast<int>(min(end - first, int64_t{kTile})), low,
                         noise);
  }
}

// All tensors of dtype T.
template <class T, DenseMode kMode>
Status launch_dense(const std::vector<DenseItem>& items, const Queries& queries,
                    const Launch& launch) {
  if (items.empty()) return Status{};
  const auto tiles_of = [](const DenseItem& item) { return (item.count + kTile - 1) / kTile; };
  int64_t total = 0;
  for (const DenseItem& item : items) total += tiles_of(item);
  const void* const kernel =
      reinterpret_cast<const void*>(&dense_kernel<T, kMode, FewItemsOf<DenseItem>>);
  const int64_t resident = resident_blocks(kernel, kThreads, 0, launch.device);
  int64_t tiles = 1;
  while (tiles < kMostTiles && total >= 16 * tiles * resident) tiles *= 2;
  const auto chunks = [&](const DenseItem& item) { return (tiles_of(item) + tiles - 1) / tiles; };
  return for_each_batch(
      items.data(), static_cast<int64_t>(items.size()), chunks, [&](const auto& batch) {
        using Batch = std::decay_t<decltype(batch)>;
        const int64_t grid = std::min<int64_t>(resident, batch.pieces);
        dense_kernel<T, kMode, Batch><<<static_cast<unsigned>(grid), kThreads, 0,
                                        static_cast<cudaStream_t>(launch.stream)>>>(
            batch, queries, static_cast<uint32_t>(tiles));
      });
}

}  // namespace subzero::cuda
