// The core C of an update: made from noise, or read, and put into shared memory as operand B.
#pragma once

#include "lowrank_traits.cuh"

namespace subzero::cuda {

// mu sum_k coeff[k] z_(draw + k) for four neighbouring elements of C.
__device__ __forceinline__ Normals core_quad(const UpdateItem& item, const UpdateCall& call,
                                             uint32_t quad) {
  Normals sum{};
  for (int64_t k = 0; k < call.queries; ++k) {
    const float coeff = call.coeff[k];
    if (coeff == 0.0f) continue;
    const Normals z = block_normals(noise_source(call.rng, item.stream, k), quad);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.z[j] = fma_(coeff, z.z[j], sum.z[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sum.z[j] *= item.mu;
  return sum;
}

// One element of C, in parts, at row k and column n of what is staged, columns in the order of
// operands.
template <class Traits>
__device__ __forceinline__ void put_core(float value, int k, int n, uint16_t* out) {
  uint32_t part[Traits::kC];
  split(value, 0.0f, part);
#pragma unroll
  for (int p = 0; p < Traits::kC; ++p)
    out[(p * Traits::kCoreRows + k) * Traits::kCorePitch + Traits::place(n)] =
        static_cast<uint16_t>(part[p]);
}

// Rows first .. first + kCoreRows and columns column .. column + kPanel of C, in parts; zero
// outside of C.
template <class Traits>
__device__ __forceinline__ void stage_core(const UpdateItem& item, const UpdateCall& call,
                                           int first, int column, uint16_t* out) {
  constexpr int kCount = Traits::kCoreRows * Traits::kPanel;
  const int rank = item.rank, thread = static_cast<int>(threadIdx.x);
  if (!Traits::kMakesCores || call.cores != nullptr) {
    const float* const core = call.cores + item.core;
    for (int i = thread; i < kCount; i += Traits::kThreads) {
      const int k = i / Traits::kPanel, n = i % Traits::kPanel;
      const bool real = first + k < rank && column + n < rank;
      put_core<Traits>(real ? core[(first + k) * rank + column + n] : 0.0f, k, n, out);
    }
    return;
  }
  if constexpr (Traits::kMakesCores) {
    if (rank < Traits::kPanel) {
      for (int i = thread; i < kCount; i += Traits::kThreads)
        put_core<Traits>(0.0f, i / Traits::kPanel, i % Traits::kPanel, out);
      __syncthreads();
    }
    const int begin = first * rank, end = min(first + Traits::kCoreRows, rank) * rank;
    for (int quad = begin / 4 + thread; 4 * quad < end; quad += Traits::kThreads) {
      const Normals value = core_quad(item, call, static_cast<uint32_t>(quad));
      int k = 4 * quad / rank, n = 4 * quad % rank;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * quad + j >= begin && 4 * quad + j < end)
          put_core<Traits>(value.z[j], k - first, n, out);
        if (++n == rank) n = 0, ++k;
      }
    }
  }
}

}  // namespace subzero::cuda
