// The kernel of W = decay W + U C V^T. W is read once into the registers where the tensor cores
// leave U C V^T, updated and written from there.
//
//   block    kTileRows rows (a strip) of one W, and a chunk of its columns, tile after tile
//   warp     16 rows; P = U C for them stays in registers, as operand A
//   tile     kWarpColumns columns a warp; V for them goes through shared memory, while the tile
//            before is computed, and so does W, kStages - 1 tiles ahead
//
// The sum of an n-block of 8 columns lies two neighbouring columns to a thread. Taken over
// kVec / 2 n-blocks that are 16 bytes of W, if n-block j has columns 2j, 2j + 1 of each kVec: an
// order of columns that costs nothing, since it only says which rows of V make an operand B.
//
// Precision: numbers are sums of bf16 parts (8 bits each), products of parts are exact and added in
// fp32, and the smallest products are left out: i + j < n of parts i and j. Two parts leave an
// error of about 4e-6, one part of 1.6e-3: the whole error for 16-bit W. Where ranks are tiny a few
// numbers decide, and their errors do not average out; there parts are plenty and cost little. fp16
// with fp16 bases multiplies fp16 instead, P scaled by a power of two to fit: one part, 2e-4.
#pragma once

#include "lowrank_basis.cuh"
#include "lowrank_core.cuh"
#include "lowrank_weight.cuh"

namespace subzero::cuda {

// The shape of a thread block, to be chosen by measurement.
template <int kWarpsDown_, int kWarpsAcross_, int kWarpColumns_, int kResident_, int kStages_,
          LoadHint kLoad_ = LoadHint::none, StoreHint kStore_ = StoreHint::none, int kAhead_ = 0>
struct Shape {
  static constexpr int kWarpsDown = kWarpsDown_;      // strips of 16 rows
  static constexpr int kWarpsAcross = kWarpsAcross_;  // beside each other in a tile
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr int kResident = kResident_;  // blocks on a multiprocessor
  static constexpr int kStages = kStages_;      // tiles of W in shared memory, 2 or 3
  static_assert(kStages == 2 || kStages == 3, "V is waited for with at most one tile of W behind");
  static constexpr LoadHint kLoad = kLoad_;
  static constexpr StoreHint kStore = kStore_;
  static constexpr int kAhead = kAhead_;  // columns of W to fetch into L2 ahead, 0: none
};

template <class W_, class B_, int kRank_, class Shape_>
struct UpdateTraits : Shape_ {
  using W = W_;
  using B = B_;
  static constexpr int kRank = kRank_;
  static constexpr bool kWide = sizeof(B) == 4;
  static constexpr bool kHalf = std::is_same_v<W, f16> && !kWide;
  static constexpr bool kTiny = kRank == 16;
  static constexpr bool kMakesCores = kRank <= kMostOwnRank;

  // Parts of U, C, P = U C and V.
  static constexpr int kU = sizeof(W) == 4 ? 3 : std::is_same_v<B, bf16> ? 1 : 2;
  static constexpr int kC = sizeof(W) == 4 ? 3 : 2;
  static constexpr int kP = kHalf ? 1 : (sizeof(W) == 4 ? 2 : 1) + (kTiny ? 1 : 0);
  static constexpr int kV = !kWide ? 1 : sizeof(W) == 4 && kTiny ? 3 : 2;

  static constexpr int kVec = 16 / sizeof(W);
  static constexpr int kThreads = 32 * Shape_::kWarpsDown * Shape_::kWarpsAcross;
  static constexpr int kTileRows = 16 * Shape_::kWarpsDown;
  static constexpr int kTileColumns = Shape_::kWarpColumns * Shape_::kWarpsAcross;
  static constexpr int kSpan = 4 * kVec;    // columns of W in one access of a warp
  static constexpr int kBlocks = kVec / 2;  // n-blocks that make a span
  static constexpr int kSpans = Shape_::kWarpColumns / kSpan;
  static constexpr int kSteps = kRank / 16;
  static constexpr int kGroups = kSpans * kBlocks / 4;   // of four n-blocks
  static constexpr int kPartsOfGroup = 2 * 4 / kBlocks;  // 16 bytes of W a thread each

  // Shared memory, in 16-bit numbers: two tiles of V, or some rows of C before the first.
  static constexpr int kPitch = kRank + 8;
  static constexpr int kPartNumbers = kTileColumns * kPitch;
  static constexpr int kTileNumbers = kV * kPartNumbers;
  static constexpr int kBasisBytes = 2 * kTileNumbers * 2;
  static constexpr int kWeightBytes = Shape_::kStages * kThreads * kSpans * 2 * 16;
  // A first tile of V that is not wide is under way when C takes the place of the second.
  static constexpr int kPanel = kRank < 64 ? kRank : 64;  // columns of C, and of P, at a time
  static constexpr int kCorePitch = kPanel + 8;
  static constexpr int kCoreRoom = (kWide ? 2 : 1) * kTileNumbers / (kC * kCorePitch);
  static constexpr int kCoreRows = kCoreRoom >= 32 && kRank >= 32 ? 32 : 16;
  static constexpr int kCoreAt = kWide ? 0 : kTileNumbers;
  static_assert(kCoreRoom >= 16, "no room for C");
#if !defined(SUBZERO_TUNE)
  static_assert(kBasisBytes + kWeightBytes <= 99 << 10, "more than a block of sm_86 may have");
#endif
  static_assert(kSpans * kBlocks % 4 == 0, "n-blocks are computed by fours");

  // Where column c of a tile lies in a tile of V: span by span, n-block by n-block.
  static __device__ __forceinline__ int place(int c) {
    const int span = c / kSpan, thread = c % kSpan / kVec, i = c % kVec;
    return span * kSpan + i / 2 * 8 + 2 * thread + i % 2;
  }
};

// P = U C of a warp's 16 rows as fragments A, and what its numbers are to be multiplied by.
template <class T>
struct Left {
  FragmentA part[T::kP][T::kSteps];
  float unscale;
};

// sum = U C for kPanel columns of C from `column`.
template <class T>
__device__ __forceinline__ void make_panel(float (&sum)[T::kPanel / 8][4], const BasisRows<T>& rows,
                                           const UpdateItem& item, const UpdateCall& call,
                                           int column, uint16_t* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Lane 8 i + x: row x of matrix i, of k + 0 or 8 (i % 2) and n + 0 or 8 (i / 2).
  const uint32_t corner = shared_address(shared) + 2 * (lane % 16 * T::kCorePitch + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < T::kPanel / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
  for (int first = 0; first < item.rank; first += T::kCoreRows) {
    constexpr int kSteps = T::kCoreRows / 16;
    typename BasisRows<T>::Pair pair[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[step][i] = rows.load(i % 2, first + 16 * step + 8 * (i / 2) + lane % 4 * 2);
    if (column > 0 || first > 0) __syncthreads();
    stage_core<T>(item, call, first, column, shared);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      FragmentA u[T::kU];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t parts[T::kU];
        rows.parts(pair[step][i], parts);
#pragma unroll
        for (int p = 0; p < T::kU; ++p) u[p][i] = parts[p];
      }
#pragma unroll
      for (int n = 0; n < T::kPanel / 8; n += 2) {
#pragma unroll
        for (int c = 0; c < T::kC; ++c) {
          uint32_t b[4];
          load_matrices_transposed(
              b, corner + 2 * ((c * T::kCoreRows + 16 * step) * T::kCorePitch + 8 * n));
#pragma unroll
          for (int p = 0; p < T::kU; ++p) {
            if (p + c >= (T::kU > T::kC ? T::kU : T::kC)) continue;
            mma<false>(sum[n], u[p], b[0], b[1]);
            mma<false>(sum[n + 1], u[p], b[2], b[3]);
          }
        }
      }
    }
  }
}

// The largest number of a warp's 16 rows.
template <int kCount>
__device__ __forceinline__ float largest(const float (&sum)[kCount][4]) {
  float most = 0.0f;
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(sum[n][i]));
#pragma unroll
  for (int other = 16; other > 0; other /= 2)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, other));
  return most;
}

template <class T>
__device__ __forceinline__ Left<T> make_left(const UpdateItem& item, const UpdateCall& call,
                                             int64_t row, uint16_t* shared) {
  constexpr int kPanelSteps = T::kPanel / 16;
  const BasisRows<T> rows(item, row);
  Left<T> left;
  float most = 0.0f, scale = 1.0f;
#pragma unroll
  for (int panel = 0; panel < T::kRank / T::kPanel; ++panel) {
    float sum[T::kPanel / 8][4];
    make_panel<T>(sum, rows, item, call, panel * T::kPanel, shared);
    if constexpr (T::kHalf) {
      // The largest number so far becomes 2^13 and more; fp16 ends at 2^16.
      most = fmaxf(most, largest(sum));
      const int exponent = static_cast<int>(float_bits(most) >> 23);
      const int up = min(max(127 + 13 - exponent, -120), 120);
      const float before = scale;
      scale = bits_float(static_cast<uint32_t>(127 + up) << 23);
      left.unscale = bits_float(static_cast<uint32_t>(127 - up) << 23);
      if (panel > 0) {
        const __half2 down = __float2half2_rn(scale / before);
#pragma unroll
        for (int step = 0; step < panel * kPanelSteps; ++step)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t& x = left.part[0][step][i];
            x = bits_of(__hmul2(half2_of(x), down));
          }
      }
    }
#pragma unroll
    for (int step = 0; step < kPanelSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // n-blocks 2 step and 2 step + 1 are columns 0-7 and 8-15 of the fragment.
        const float low = sum[2 * step + i / 2][i % 2 * 2];
        const float high = sum[2 * step + i / 2][i % 2 * 2 + 1];
        const int at = panel * kPanelSteps + step;
        if constexpr (T::kHalf) {
          left.part[0][at][i] = pack_f16(low * scale, high * scale);
        } else {
          uint32_t parts[T::kP];
          split(low, high, parts);
#pragma unroll
          for (int p = 0; p < T::kP; ++p) left.part[p][at][i] = parts[p];
        }
      }
  }
  return left;
}

// sum = P V^T for four n-blocks, whose rows of V begin at `corner`.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4][4], const Left<T>& left, uint32_t corner,
                                         int rank) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[j][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    // Past the rank there are zeros only.
    if (T::kRank > 64 && step % 2 == 0 && step > 0 && 16 * step >= rank) break;
    uint32_t b[T::kV][2][4];
#pragma unroll
    for (int v = 0; v < T::kV; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_matrices(b[v][half],
                      corner + 2 * (v * T::kPartNumbers + 16 * half * T::kPitch + 16 * step));
#pragma unroll
    for (int v = 0; v < T::kV; ++v)
#pragma unroll
      for (int p = 0; p < T::kP; ++p) {
        if (p + v >= (T::kP > T::kV ? T::kP : T::kV)) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma<T::kHalf>(sum[j], left.part[p][step], b[v][j / 2][j % 2 * 2],
                        b[v][j / 2][j % 2 * 2 + 1]);
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

// Asks for kAhead columns of the strip from `first` on, to lie in L2 when they are loaded. DRAM
// likes long runs, and is not idle while P is made.
template <class T>
__device__ __forceinline__ void fetch_ahead(const UpdateItem& item, int64_t row, int64_t column,
                                            int first, int columns) {
  using W = typename T::W;
  const int count = min(T::kAhead, columns - first);
  row += threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= T::kTileRows || count <= 0 || row >= item.rows) return;
  const W* const from = static_cast<const W*>(item.w) + row * item.w_stride + column + first;
  fetch_to_l2(from, count * static_cast<int>(sizeof(W)));
}

template <class T, Access kAccess, class Batch>
__global__ void __launch_bounds__(T::kThreads, T::kResident)
    lowrank_update_kernel(const __grid_constant__ Batch batch,
                          const __grid_constant__ UpdateCall call) {
  constexpr bool kVector = kAccess != Access::elements;
  extern __shared__ __align__(16) uint16_t shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int place = batch.find(blockIdx.x);
  const UpdateItem& item = batch.items[place];
  const uint32_t block = blockIdx.x - batch.first[place];
  const uint32_t strip = block / item.chunks;
  const int64_t column = static_cast<int64_t>(block - strip * item.chunks) * item.chunk;
  const int columns =
      static_cast<int>(min(static_cast<int64_t>(item.chunk), item.columns - column));
  const int64_t strip_row = static_cast<int64_t>(strip) * T::kTileRows;
  const int64_t row = strip_row + warp / T::kWarpsAcross * 16 + lane / 4;
  const int across = warp % T::kWarpsAcross * T::kWarpColumns;
  const int mine = across + lane % 4 * T::kVec;

  // Cores made by a launch before wait until they are needed, everything else is older than that
  // launch (UpdatePlan::run).
  if (!call.cores_made) wait_for_launch_before();
  allow_launch_after();

  // What comes from memory and does not depend on C is under way while C is made.
  using Weight = std::conditional_t<kVector, WeightRows<T>, WeightElements<T>>;
  const Weight w(item, row, column + mine, columns - mine,
                 reinterpret_cast<unsigned char*>(shared) + T::kBasisBytes);
  constexpr bool kAhead = kVector && T::kAhead > 0;
  BasisTile<T> v(item, column, columns);
  v.fetch(0, shared);
  end_copies();
  if constexpr (kVector)
    for (int stage = 0; stage < T::kStages - 1; ++stage) {
      w.fetch(stage * T::kTileColumns, stage);
      end_copies();
    }
  if constexpr (kAhead) fetch_ahead<T>(item, strip_row, column, 0, columns);
  NoiseSource words{};
  if (kAccess == Access::stochastic || (kAccess == Access::elements && call.stochastic))
    words = noise_source(call.rng, rounding_stream(item.stream));

  if (call.cores_made) wait_for_launch_before();
  const Left<T> left = make_left<T>(item, call, row, shared + T::kCoreAt);
  if constexpr (T::kWide) {
    __syncthreads();
    v.put(shared);
  }

  // Lane 8 i + x: row x of matrix i, of n-block i / 2 and k + 0 or 8 (i % 2).
  const uint32_t corner = shared_address(shared) +
                          2 * ((across + lane / 16 * 8 + lane % 8) * T::kPitch + lane / 8 % 2 * 8);
  int parity = 0, stage = 0;  // of this tile of V, of W
  for (int first = 0; first < columns; first += T::kTileColumns, parity ^= 1) {
    wait_for_copies<kVector ? T::kStages - 2 : 0>();
    __syncthreads();  // this tile of V is there, and nobody needs the one before
    const int next = first + T::kTileColumns;
    uint16_t* const other = shared + (parity ^ 1) * T::kTileNumbers;
    if (next < columns) v.fetch(next, other);
    end_copies();
    if constexpr (kVector) {
      // Into the stage of the tile before, which this thread has read.
      w.fetch(first + (T::kStages - 1) * T::kTileColumns, stage == 0 ? T::kStages - 1 : stage - 1);
      end_copies();
    }
    if constexpr (kAhead)
      if (first % T::kAhead == 0)
        fetch_ahead<T>(item, strip_row, column, first + T::kAhead, columns);
    const uint32_t here = corner + 2 * parity * T::kTileNumbers;
    if constexpr (kVector) {
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group) {
        float sum[4][4];
        multiply<T>(sum, left, here + 2 * 32 * group * T::kPitch, item.rank);
#pragma unroll
        for (int part = 0; part < T::kPartsOfGroup; ++part) {
          const int s = group * T::kPartsOfGroup / 2 + part / 2, h = part % 2;
          const int offset = first + s * T::kSpan;
          float added[T::kVec];
          gather<T>(added, sum, part, left.unscale);
          uint32_t word[T::kVec];
          if constexpr (kAccess == Access::stochastic) w.words(words, h, offset, word);
          w.store(h, offset,
                  updated<typename T::W>(w.load(stage, s, h), added, call,
                                         kAccess == Access::stochastic ? word : nullptr));
        }
      }
    } else {
#pragma unroll 1
      for (int group = 0; group < T::kGroups; ++group) {
        float sum[4][4];
        multiply<T>(sum, left, here + 2 * 32 * group * T::kPitch, item.rank);
#pragma unroll 1
        for (int part = 0; part < T::kPartsOfGroup; ++part) {
          float added[T::kVec];
          gather<T>(added, sum, part, left.unscale);
          const int s = group * T::kPartsOfGroup / 2 + part / 2;
          w.update(part % 2, first + s * T::kSpan, added, call, words);
        }
      }
    }
    if (next < columns) v.put(other);
    stage = stage == T::kStages - 1 ? 0 : stage + 1;
  }
}

}  // namespace subzero::cuda
