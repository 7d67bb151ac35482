// What the kernels of one dtype of W, of the bases, and one class of ranks agree on.
//
// A warp computes 16 rows at a time of a few columns of W += P V^T, P = U C: P is operand A, V^T is
// operand B of mma.m16n8k16. Two orders are chosen so that memory is read 16 bytes at a time:
//
//   columns  The sum of an n-block of 8 columns lies two neighbouring columns to a thread. Over
//            kVec / 2 n-blocks that are 16 bytes of W, if n-block j has columns 2j, 2j + 1 of each
//            kVec: it only says which rows of V make an operand B.
//   ranks    The sum over k may go in any order. A thread's numbers of two steps of 16 are 8
//            neighbours of a row of V: it only says in which order the columns of C are.
//
// Precision: numbers are sums of bf16 parts (8 bits each), products of parts are exact and added in
// fp32, and the smallest products are left out: i + j < n of parts i and j. Two parts leave an
// error of about 4e-6, one part of 1.6e-3: the whole error for 16-bit W. Where ranks are tiny a few
// numbers decide, and their errors do not average out; there parts are plenty and cost little. fp16
// with fp16 bases multiplies fp16 instead, P scaled by a power of two to fit: one part, 2e-4.
#pragma once

#include <type_traits>

#include "lowrank_update.cuh"
#include "mma.cuh"
#include "storage.cuh"

namespace subzero::cuda {

// The shape of a thread block, to be chosen by measurement.
template <int kWarps_, int kSpans_, int kResident_, int kStages_,
          StoreHint kStore_ = StoreHint::none>
struct Shape {
  static constexpr int kWarps = kWarps_;
  static constexpr int kSpans = kSpans_;        // of 64 bytes of a row of W, to a warp
  static constexpr int kResident = kResident_;  // blocks on a multiprocessor
  static constexpr int kStages = kStages_;      // tiles of W in shared memory
  static constexpr StoreHint kStore = kStore_;
};

template <class W_, class B_, int kRank_, class Shape_>
struct UpdateTraits : Shape_ {
  using W = W_;
  using B = B_;
  static constexpr int kRank = kRank_;
  static constexpr bool kWide = sizeof(B) == 4;  // bases in fp32, or one of them
  static constexpr bool kHalf = std::is_same_v<W, f16> && !kWide;
  static constexpr bool kTiny = kRank == 16;

  // Parts of U, C, P = U C and V.
  static constexpr int kU = sizeof(W) == 4 ? 3 : std::is_same_v<B, bf16> ? 1 : 2;
  static constexpr int kC = sizeof(W) == 4 ? 3 : 2;
  static constexpr int kP = kHalf ? 1 : (sizeof(W) == 4 ? 2 : 1) + (kTiny ? 1 : 0);
  static constexpr int kV = !kWide ? 1 : sizeof(W) == 4 && kTiny ? 3 : 2;

  static constexpr int kVec = 16 / sizeof(W);
  static constexpr int kThreads = 32 * Shape_::kWarps;
  static constexpr int kSpan = 4 * kVec;
  static constexpr int kBlocks = kVec / 2;  // n-blocks that make a span
  static constexpr int kColumns = Shape_::kSpans * kSpan;
  static constexpr int kSteps = kRank / 16;
  static constexpr int kGroups = Shape_::kSpans * kBlocks / 4;  // of four n-blocks
  static constexpr int kPartsOfGroup = 2 * 4 / kBlocks;         // 16 bytes of W a thread each
  static_assert(Shape_::kSpans * kBlocks % 4 == 0, "n-blocks are computed by fours");

  // Where a thread keeps its numbers of V: in registers, or in shared memory where they are many.
  static constexpr int kRightWords = kV * 4 * kGroups * kSteps * 2;
  static constexpr bool kRightShared = kRightWords > 128;
  static constexpr int kRightBytes = kRightShared ? kRightWords * 4 * kThreads : 0;
  static constexpr int kTileBytes = kThreads * Shape_::kSpans * 2 * 16;
  static constexpr int kWeightBytes = Shape_::kStages * kTileBytes;
#if !defined(SUBZERO_TUNE)
  static_assert(kRightBytes + kWeightBytes <= 96 << 10, "more than a block of sm_86 may have");
#endif

  // Numbers of a row of V that lie beside each other in a thread's operand B.
  static constexpr int kRun = kSteps == 1 ? 4 : 8;
  static constexpr int kSteps2 = kSteps == 1 ? 1 : 2;

  // The place of column k of C in the order in which operands have them.
  static __device__ __forceinline__ int place(int k) {
    const int within = k % (4 * kRun);
    const int thread = within / kRun, step = within % kRun / 4, half = within % 4 / 2;
    return k - within + 16 * step + 8 * half + 2 * thread + k % 2;
  }
};

}  // namespace subzero::cuda
