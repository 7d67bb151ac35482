// The kernels of one dtype of W and one class of ranks: CMake compiles this file for each pair,
// with SUBZERO_WEIGHT (float, bf16 or f16) and SUBZERO_RANK defined.
#include <cstdlib>
#include <tuple>

#include "lowrank_kernel.cuh"

namespace subzero::cuda {
namespace {

// Measured on an H100 before W came through shared memory, share of the in-place-add bandwidth: two
// warps beside each other (rows of 256 bytes) against eight below each other, OPT-13B at rank 64 in
// bf16 0.84 against 0.79, OPT-1.3B at rank 24 1.01 against 0.94; for fp32 and at rank 128 eight are
// as good or better (0.78 against 0.85 at rank 24).
template <class W, class B, int kRank>
struct Choice {
  static constexpr bool kSame = sizeof(W) == sizeof(B);
  static constexpr bool kTwo = kRank <= (!kSame ? 32 : sizeof(W) == 2 ? 128 : 64);
  static constexpr int kAcross = kSame && sizeof(W) == 2 && kRank <= 64 ? 2 : 1;
  // Bytes of a row of a warp's tile: a cache line, but where V in parts takes too much room.
  static constexpr int kBytes = !kSame && kRank >= 128 ? 64 : 128;
  static constexpr int kStages = kSame && kRank == 256 ? 2 : 3;
  using Type = Shape<8 / kAcross, kAcross, kBytes / sizeof(W), kTwo ? 2 : 1, kStages>;
};
template <class W, class B, int kRank>
using Chosen = typename Choice<W, B, kRank>::Type;

// kFew: worth a kernel of its own for short lists.
template <class T, Access kAccess, bool kFew>
UpdateKernel kernel() {
  using Few = std::conditional_t<kFew, FewItems, ManyItems>;
  return {kFew ? reinterpret_cast<const void*>(&lowrank_update_kernel<T, kAccess, Few>) : nullptr,
          reinterpret_cast<const void*>(&lowrank_update_kernel<T, kAccess, ManyItems>),
          T::kThreads,
          T::kTileRows,
          T::kTileColumns,
          T::kResident,
          T::kBasisBytes + (kAccess == Access::elements ? 0 : T::kWeightBytes)};
}

template <class W, class B, int kRank, class Shape>
UpdateKernel kernel(Access access) {
  using T = UpdateTraits<W, B, kRank, Shape>;
  constexpr bool kFew = sizeof(W) == sizeof(B);
  if (access == Access::elements) return kernel<T, Access::elements, false>();
  if constexpr (sizeof(W) == 2)
    if (access == Access::stochastic) return kernel<T, Access::stochastic, kFew>();
  return kernel<T, Access::nearest, kFew>();
}

#if defined(SUBZERO_TUNE)
// Every shape, for benchmarks/tune_perturb.py: SUBZERO_TUNE_SHAPE is a number of this list.
template <class W, int kRank, int kNumber = 0>
UpdateKernel tuned(Access access, int number) {
  constexpr auto none = LoadHint::none, fetch256 = LoadHint::fetch256;
  constexpr auto keep = StoreHint::none, streaming = StoreHint::streaming;
  constexpr int kLine = 128 / sizeof(W), kTwo = Choice<W, W, kRank>::kTwo ? 2 : 1;
  constexpr int kMost = Chosen<W, W, kRank>::kStages;
  using Shapes = std::tuple<Chosen<W, W, kRank>,                                          // 0
                            Shape<8, 1, kLine, kTwo, kMost>,                              // 1
                            Shape<8, 1, kLine, kTwo, 2>,                                  // 2
                            Shape<8, 1, kLine, kTwo, kMost, none, streaming>,             // 3
                            Shape<8, 1, kLine, kTwo, kMost, fetch256>,                    // 4
                            Shape<8, 1, kLine, kTwo, kMost, none, keep, 4 * kLine>,       // 5
                            Shape<8, 1, kLine, kTwo, kMost, none, streaming, 4 * kLine>,  // 6
                            Shape<4, 2, kLine, kTwo, 2>,                                  // 7
                            Shape<4, 2, kLine, kTwo, 2, none, keep, 4 * kLine>,           // 8
                            Shape<4, 1, kLine, 2 * kTwo, 2>,                              // 9
                            Shape<8, 1, 2 * kLine, kTwo, 2>,                              // 10
                            Shape<12, 1, kLine, 1, 2>,                                    // 11
                            Shape<16, 1, kLine, 1, 2>,                                    // 12
                            Shape<8, 1, kLine, kRank <= 32 ? 3 : 1, 2>>;                  // 13
  if (number == kNumber) return kernel<W, W, kRank, std::tuple_element_t<kNumber, Shapes>>(access);
  if constexpr (kNumber + 1 < std::tuple_size_v<Shapes>)
    return tuned<W, kRank, kNumber + 1>(access, number);
  return {};
}
#endif

}  // namespace

template <class W, int kRank>
UpdateKernel update_kernel([[maybe_unused]] bool wide, Access access) {
#if defined(SUBZERO_TUNE)
  const char* const number = std::getenv("SUBZERO_TUNE_SHAPE");
  return tuned<W, kRank>(access, number == nullptr ? 0 : std::atoi(number));
#else
  return wide ? kernel<W, float, kRank, Chosen<W, float, kRank>>(access)
              : kernel<W, W, kRank, Chosen<W, W, kRank>>(access);
#endif
}

template UpdateKernel update_kernel<SUBZERO_WEIGHT, SUBZERO_RANK>(bool, Access);

}  // namespace subzero::cuda
