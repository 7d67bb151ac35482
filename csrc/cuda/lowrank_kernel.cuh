// The kernel of W = decay W + P V^T, P = U C made by the kernel before (lowrank_left.cuh). W is
// read once into the registers where the tensor cores leave P V^T, updated and written from there.
//
//   block   a unit: some columns of one W, and every so many-th tile of rows, so that all blocks of
//           a matrix walk down its rows together, which DRAM likes; P for them lies in shared
//           memory
//   warp    kColumns columns, for which V stays in registers, and 16 rows of each tile. Warps lie
//           beside each other, or, where W is narrow, also below each other
//   thread  16 bytes of W at a time, which come through shared memory, kStages - 1 tiles ahead
//
// After P has come warps do not wait for each other.
#pragma once

#include "lowrank_basis.cuh"
#include "lowrank_weight.cuh"

namespace subzero::cuda {

// sum = P V^T for four n-blocks of a strip, whose operands A begin at `left` for this lane.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4][4], const Right<T>& right, int group,
                                         const uint4* left, int steps) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[j][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    // Past the rank there are zeros only.
    if (T::kRank > 32 && step % 2 == 0 && step >= steps) break;
    FragmentA a[T::kP];
#pragma unroll
    for (int p = 0; p < T::kP; ++p) {
      const uint4 word = left[(p * steps + step) * 32];
      a[p][0] = word.x, a[p][1] = word.y, a[p][2] = word.z, a[p][3] = word.w;
    }
#pragma unroll
    for (int v = 0; v < T::kV; ++v)
#pragma unroll
      for (int p = 0; p < T::kP; ++p) {
        if (p + v >= (T::kP > T::kV ? T::kP : T::kV)) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t b0, b1;
          right.get(v, 4 * group + j, step, b0, b1);
          mma<T::kHalf>(sum[j], a[p], b0, b1);
        }
      }
  }
}

// The sums of one access, row q or q + 8 (part % 2) of a span, out of those of four n-blocks.
template <class T>
__device__ __forceinline__ void gather(float (&added)[T::kVec], const float (&sum)[4][4], int part,
                                       float unscale) {
#pragma unroll
  for (int p = 0; p < T::kPartsOfGroup; ++p)
#pragma unroll
    for (int i = 0; i < T::kVec; ++i)
      if (p == part) added[i] = sum[p / 2 * T::kBlocks + i / 2][p % 2 * 2 + i % 2];
  if constexpr (T::kHalf) {
#pragma unroll
    for (int i = 0; i < T::kVec; ++i) added[i] *= unscale;
  }
}

template <class T, Access kAccess, class Batch>
__global__ void __launch_bounds__(T::kThreads, T::kResident)
    lowrank_update_kernel(const __grid_constant__ Batch batch,
                          const __grid_constant__ UpdateCall call) {
  constexpr bool kVector = kAccess != Access::elements;
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const room = shared + (kVector ? T::kWeightBytes : 0);  // of V
  uint4* const left_room = reinterpret_cast<uint4*>(room + T::kRightBytes);

  const int place = batch.find(batch.first_unit, blockIdx.x);
  const UpdateItem& item = batch.items[place];
  const uint32_t unit = blockIdx.x - batch.first_unit[place];
  const uint32_t phase = unit / item.chunks, chunk = unit - phase * item.chunks;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int below = 31 - __clz(T::kWarps) - item.across;  // 2^below strips to a tile
  const int my_strip = warp >> item.across, across = warp & ((1 << item.across) - 1);
  const int64_t all_strips = (item.rows + 15) / 16, first_strip = int64_t{phase} << below;
  const int64_t step = int64_t{item.phases} << below;  // strips
  // Of which this warp's strip is inside.
  const int tiles = static_cast<int>((all_strips - first_strip - my_strip + step - 1) / step);
  const int64_t column = ((int64_t{chunk} << item.across) + across) * T::kColumns;

  // What comes from memory and does not depend on P is under way while P is made.
  using Weight = std::conditional_t<kVector, WeightRows<T>, WeightElements<T>>;
  Weight w(item, 16 * (first_strip + my_strip) + lane / 4, column + lane % 4 * T::kVec, 16 * step,
           tiles, shared);
  if constexpr (kVector)
    for (int stage = 0; stage < T::kStages - 1; ++stage) {
      w.fetch(stage);
      end_copies();
    }
  const Right<T> right(item, column, room);
  NoiseSource words{};
  if (kAccess == Access::stochastic || (kAccess == Access::elements && call.stochastic))
    words = noise_source(call.rng, rounding_stream(item.stream));

  wait_for_launch_before();
  allow_launch_after();
  const int steps = item.steps, size = T::kP * steps * 32;  // of a strip
  float* const unscale = reinterpret_cast<float*>(left_room + (item.tiles << below) * size);
  for (int i = warp; i < item.tiles << below; i += T::kWarps) {
    const int64_t strip = first_strip + (i >> below) * step + (i & ((1 << below) - 1));
    if (strip >= all_strips) break;
    const uint4* const from = call.left + item.left + strip * size;
#pragma unroll 4
    for (int j = lane; j < size; j += 32) left_room[i * size + j] = from[j];
    if (T::kHalf && lane == 0) unscale[i] = item.scales(call)[strip];
  }
  __syncthreads();
  if (column >= item.columns) return;

  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int strip = (tile << below) + my_strip;
    const uint4* const left = left_room + strip * size + lane;
    const float scale = T::kHalf ? unscale[strip] : 1.0f;
    if constexpr (kVector) {
      wait_for_copies<T::kStages - 2>();
      // Into the stage of the tile before, which this thread has read.
      w.fetch(stage == 0 ? T::kStages - 1 : stage - 1);
      end_copies();
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        float sum[4][4];
        multiply<T>(sum, right, group, left, steps);
#pragma unroll
        for (int part = 0; part < T::kPartsOfGroup; ++part) {
          const int s = group * T::kPartsOfGroup / 2 + part / 2, h = part % 2;
          float added[T::kVec];
          gather<T>(added, sum, part, scale);
          uint32_t word[T::kVec];
          if constexpr (kAccess == Access::stochastic) w.words(words, s, h, word);
          w.store(s, h,
                  updated<typename T::W>(w.load(stage, s, h), added, call,
                                         kAccess == Access::stochastic ? word : nullptr));
        }
      }
      w.next();
      stage = stage == T::kStages - 1 ? 0 : stage + 1;
    } else {
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        float sum[4][4];
        multiply<T>(sum, right, group, left, steps);
#pragma unroll 1
        for (int part = 0; part < T::kPartsOfGroup; ++part) {
          float added[T::kVec];
          gather<T>(added, sum, part, scale);
          const int s = group * T::kPartsOfGroup / 2 + part / 2;
          w.update(tile, s, part % 2, added, call, words);
        }
      }
    }
  }
}

}  // namespace subzero::cuda
