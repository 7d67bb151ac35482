// The kernel of W = decay W + P V^T, P = U C made by the kernel before (lowrank_left.cuh). W passes
// once through the chip: a tile comes to shared memory, from there to the registers where the
// tensor cores leave P V^T, and back.
//
//   block   a unit: some columns of one W, and every so many-th tile of rows, so that all blocks of
//           a matrix walk down its rows together, which DRAM likes
//   tile    rows of W and what P has for them, fetched kStages - 1 tiles ahead
//   warp    kColumns columns, for which V stays in registers, and a strip of 16 rows of each tile.
//           Warps lie beside each other or, where W is narrow, also below each other
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
__global__ void __launch_bounds__(T::kThreads, kAccess == Access::elements ? 1 : T::kResident)
    lowrank_update_kernel(const __grid_constant__ Batch batch,
                          const __grid_constant__ UpdateCall call) {
  constexpr bool kVector = kAccess != Access::elements;
  constexpr bool kStochastic = kAccess == Access::stochastic;
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const right_room = shared + (kVector ? T::kWeightBytes : 0);
  uint4* const left_room = reinterpret_cast<uint4*>(right_room + T::kRightBytes);

  const int place = batch.find(batch.first_unit, blockIdx.x);
  const UpdateItem& item = batch.items[place];
  const uint32_t unit = blockIdx.x - batch.first_unit[place];
  const uint32_t phase = unit / item.chunks, chunk = unit - phase * item.chunks;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int below = 31 - __clz(T::kWarps) - item.across;  // 2^below strips to a tile
  const int64_t first_strip = int64_t{phase} << below, step = int64_t{item.phases} << below;
  const int64_t strips = (item.rows + 15) / 16 - first_strip;
  const int tiles = static_cast<int>((strips + step - 1) / step);
  const int64_t first_column = static_cast<int64_t>(chunk) * (T::kColumns << item.across);
  // This thread's fragments.
  const int strip = warp >> item.across, across = warp & ((1 << item.across) - 1);
  const int64_t row = 16 * (first_strip + strip) + lane / 4;
  const int64_t column = first_column + across * T::kColumns + lane % 4 * T::kVec;

  // What comes from memory and does not depend on P is under way while P is made.
  using Weight = std::conditional_t<kVector, WeightTiles<T>, WeightElements<T>>;
  Weight w = [&] {
    if constexpr (kVector)
      return Weight(item, 16 * first_strip, first_column, below, 16 * step, tiles, shared);
    else
      return Weight(item, row, column, 16 * step);
  }();
  if constexpr (kVector)
    for (int stage = 0; stage < T::kStages - 1; ++stage) w.fetch(stage);
  const Right<T> right(item, column - lane % 4 * T::kVec, right_room);
  NoiseSource source{};
  if (kStochastic || (!kVector && call.stochastic))
    source = noise_source(call.rng, rounding_stream(item.stream));
  using Words = std::conditional_t<kStochastic, FragmentWords<T>, NoiseSource>;
  Words words = [&] {
    if constexpr (kStochastic)
      return Words(source, item.first + row * item.columns + column, item.columns,
                   16 * step * item.columns);
    else
      return source;
  }();

  wait_for_launch_before();
  allow_launch_after();
  const int steps = item.steps, size = T::kP * steps * 32 + T::kHalf;  // of a strip of P
  const uint4* from = call.left + item.left + first_strip * size;
  int64_t left_strips = strips;
  const auto fetch_left = [&](int stage) {
    const int count =
        static_cast<int>(min(max(left_strips, int64_t{0}), int64_t{1} << below)) * size;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += T::kThreads)
      copy_async(shared_address(left_room + stage * (size << below) + i), from + i, true);
    end_copies();
    from += step * size;
    left_strips -= step;
  };
  for (int stage = 0; stage < T::kStages - 1; ++stage) fetch_left(stage);

  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<T::kStages - 2>();
    __syncthreads();
    // Into the stage of the tile before, of which this thread has written its part.
    const int before = stage == 0 ? T::kStages - 1 : stage - 1;
    if constexpr (kVector) w.fetch(before);
    fetch_left(before);
    const uint4* const left = left_room + stage * (size << below) + strip * size;
    if (column - lane % 4 * T::kVec < item.columns) {
      const float scale = T::kHalf ? bits_float(left[size - 1].x) : 1.0f;
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        float sum[4][4];
        multiply<T>(sum, right, group, left + lane, steps);
        if constexpr (kVector) {
#pragma unroll
          for (int part = 0; part < T::kPartsOfGroup; ++part) {
            const int s = group * T::kPartsOfGroup / 2 + part / 2, h = part % 2;
            float added[T::kVec];
            gather<T>(added, sum, part, scale);
            Bytes16& x = w.at(stage, s, h);
            if constexpr (kStochastic) {
              uint32_t word[T::kVec];
              words.get(s, h, word);
              x = updated<typename T::W>(x, added, call, word);
            } else {
              x = updated<typename T::W>(x, added, call);
            }
          }
        } else {
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
    __syncthreads();
    if constexpr (kVector) w.store(stage);
    if constexpr (kStochastic) words.next();
    stage = stage == T::kStages - 1 ? 0 : stage + 1;
  }
}

}  // namespace subzero::cuda
