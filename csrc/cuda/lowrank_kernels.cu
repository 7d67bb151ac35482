// The kernels of one dtype of W and one class of ranks: CMake compiles this file for each pair,
// with SUBZERO_WEIGHT (float, bf16 or f16) and SUBZERO_RANK defined.
#include <cstdlib>
#include <tuple>

#include "lowrank_kernel.cuh"

namespace subzero::cuda {
namespace {

// Measured on an H100, share of the in-place-add bandwidth: two warps beside each other (rows of
// 256 bytes) against eight below each other, OPT-13B at rank 64 in bf16 0.84 against 0.79, OPT-1.3B
// at rank 24 1.01 against 0.94; for fp32 and at rank 128 eight are as good or better (0.78 against
// 0.85 at rank 24). A tile row of a warp is 128 bytes, a cache line.
template <class W, class B, int kRank>
constexpr bool kTwo = sizeof(W) == sizeof(B) ? kRank <= (sizeof(W) == 2 ? 128 : 64) : kRank <= 32;
template <class W, int kRank>
constexpr int kAcross = sizeof(W) == 2 && kRank <= 64 ? 2 : 1;
template <class W, class B, int kRank>
using Chosen =
    Shape<8 / kAcross<W, kRank>, kAcross<W, kRank>, 128 / sizeof(W), kTwo<W, B, kRank> ? 2 : 1>;

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
          T::kSharedBytes};
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
  constexpr auto none = LoadHint::none;
  constexpr auto keep = StoreHint::none;
  constexpr int kLine = 128 / sizeof(W), kTwoIfSmall = kTwo<W, W, kRank> ? 2 : 1;
  using Shapes = std::tuple<
      Chosen<W, W, kRank>,                                                                    // 0
      Shape<8, 1, kLine, kTwoIfSmall>,                                                        // 1
      Shape<8, 1, kLine, kTwoIfSmall, LoadHint::streaming, StoreHint::streaming>,             // 2
      Shape<8, 1, kLine, kTwoIfSmall, LoadHint::fetch256_not_l1>,                             // 3
      Shape<8, 1, kLine, kTwoIfSmall, LoadHint::fetch256_not_l1, StoreHint::streaming>,       // 4
      Shape<8, 1, kLine, kTwoIfSmall, none, keep, 2 * kLine>,                                 // 5
      Shape<8, 1, kLine, kTwoIfSmall, none, keep, 8 * kLine>,                                 // 6
      Shape<8, 1, kLine, kTwoIfSmall, LoadHint::streaming, StoreHint::streaming, 4 * kLine>,  // 7
      Shape<4, 2, kLine, kTwoIfSmall, none, keep, 4 * kLine>,                                 // 8
      Shape<8, 2, kLine, 1, none, keep, 4 * kLine>,                                           // 9
      Shape<8, 1, 2 * kLine, kTwoIfSmall, none, keep, 4 * kLine>,                             // 10
      Shape<16, 1, kLine, 1, none, keep, 4 * kLine>,                                          // 11
      Shape<4, 1, kLine, 2 * kTwoIfSmall, none, keep, 4 * kLine>,                             // 12
      Shape<12, 1, kLine, 1, none, keep, 4 * kLine>,                                          // 13
      Shape<8, 1, kLine, kRank <= 32 ? 3 : 1, none, keep, 4 * kLine>>;                        // 14
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
