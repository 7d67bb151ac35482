// The core C of an update: made from noise, or read, and put into shared memory as operand B.
#pragma once

#include "lowrank_traits.cuh"

namespace subzero::cuda {

// mu sum_k coeff[k] z_(draw + k) for four neighbouring elements of C; several at once, since each
// takes long.
template <int kCount>
__device__ __forceinline__ void core_quads(const UpdateItem& item, const UpdateCall& call,
                                           const uint32_t (&quad)[kCount], Normals (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = Normals{};
  for (int64_t k = 0; k < call.queries; ++k) {
    const float coeff = call.coeff[k];
    if (coeff == 0.0f) continue;
    const NoiseSource source = noise_source(call.rng, item.stream, k);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Normals z = block_normals(source, quad[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i].z[j] = fma_(coeff, z.z[j], sum[i].z[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i].z[j] *= item.mu;
}

// No number of C is larger.
template <class Traits>
__device__ __forceinline__ float bound_of_core(const UpdateItem& item, const UpdateCall& call) {
  constexpr float kMostNormal = 7.0f;  // the square root of -2 ln 2^-33 is 6.8
  float most = 0.0f;
  if (call.cores == nullptr) {
    for (int64_t k = 0; k < call.queries; ++k) most += fabsf(call.coeff[k]);
    return most * kMostNormal * item.mu;
  }
  __shared__ float of_warp[Traits::kThreads / 32];
  const float* const core = call.cores + item.core;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < item.rank * item.rank; i += Traits::kThreads)
    most = fmaxf(most, fabsf(core[i]));
  of_warp[threadIdx.x / 32] = largest_of(most);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Traits::kThreads / 32; ++i) most = fmaxf(most, of_warp[i]);
  return most;
}

// Elements of C, in parts, at row k and column n of what is staged, in the order of operands.
template <class Traits>
__device__ __forceinline__ void put_core(float value, int k, int n, uint16_t* out) {
  uint32_t part[Traits::kC];
  split(value, 0.0f, part);
#pragma unroll
  for (int p = 0; p < Traits::kC; ++p)
    out[(p * Traits::kCoreRows + Traits::place(k)) * Traits::kCorePitch + Traits::place(n)] =
        static_cast<uint16_t>(part[p]);
}

// Two neighbours, the first in an even column: they stay neighbours.
template <class Traits>
__device__ __forceinline__ void put_core_pair(float low, float high, int k, int n, uint16_t* out) {
  uint32_t part[Traits::kC];
  split(low, high, part);
#pragma unroll
  for (int p = 0; p < Traits::kC; ++p)
    *reinterpret_cast<uint32_t*>(
        out + (p * Traits::kCoreRows + Traits::place(k)) * Traits::kCorePitch + Traits::place(n)) =
        part[p];
}

// Rows first .. first + kCoreRows and columns column .. column + kPanel of C, in parts; zero
// outside of C.
template <class Traits>
__device__ __forceinline__ void stage_core(const UpdateItem& item, const UpdateCall& call,
                                           int first, int column, uint16_t* out) {
  constexpr int kCount = Traits::kCoreRows * Traits::kPanel;
  const int rank = item.rank, thread = static_cast<int>(threadIdx.x);
  const float* const core = call.cores == nullptr ? nullptr : call.cores + item.core;
  const int rows = min(rank - first, Traits::kCoreRows);
  const int columns = min(rank - column, Traits::kPanel);
  if (core != nullptr || rows < Traits::kCoreRows || columns < Traits::kPanel) {
#pragma unroll 4
    for (int i = thread; i < kCount; i += Traits::kThreads) {
      const int k = i / Traits::kPanel, n = i % Traits::kPanel;
      const bool real = core != nullptr && k < rows && n < columns;
      put_core<Traits>(real ? core[(first + k) * rank + column + n] : 0.0f, k, n, out);
    }
    if (core != nullptr) return;
    __syncthreads();
  }
  // Four neighbours in a row-major C come from one block of the generator. Where the rank is no
  // multiple of four, some of the first and the last to a row belong to other rows or panels.
  const int quads = Traits::kPanel / 4 + (rank % 4 != 0 ? 1 : 0);
  constexpr int kAtOnce = kCount / 4 > Traits::kThreads ? kCount / 4 / Traits::kThreads : 1;
  for (int i = thread; i < rows * quads; i += kAtOnce * Traits::kThreads) {
    uint32_t quad[kAtOnce];
    Normals value[kAtOnce];
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int at = i + a * Traits::kThreads;
      quad[a] = static_cast<uint32_t>(((first + at / quads) * rank + column) / 4 + at % quads);
    }
    core_quads(item, call, quad, value);
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int k = (i + a * Traits::kThreads) / quads;
      const int n = static_cast<int>(4 * quad[a]) - (first + k) * rank - column;
      if (k < rows && rank % 4 == 0) {
        if (n >= columns) continue;
        put_core_pair<Traits>(value[a].z[0], value[a].z[1], k, n, out);
        put_core_pair<Traits>(value[a].z[2], value[a].z[3], k, n + 2, out);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (k < rows && n + j >= 0 && n + j < columns)
          put_core<Traits>(value[a].z[j], k, n + j, out);
    }
  }
}

}  // namespace subzero::cuda
