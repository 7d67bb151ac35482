// The kernels of one dtype of W and one class of ranks: CMake compiles this file for each pair,
// with SUBZERO_WEIGHT (float, bf16 or f16) and SUBZERO_RANK defined.
#include <cstdlib>
#include <tuple>

#include "lowrank_kernel.cuh"
#include "lowrank_left.cuh"

namespace subzero::cuda {
namespace {

// A warp keeps V for 128 bytes of a row, for less where that takes too many registers, and blocks
// share a multiprocessor as long as registers allow. benchmarks/tune_perturb.py compares others.
template <class W, class B, int kRank>
struct Choice {
  // Words of V in a thread, for each 64 bytes of a row.
  static constexpr int kWords = (sizeof(W) == sizeof(B) ? 1 : 2) * 4 * (kRank / 16) * 2;
  static constexpr int kSpans = kWords <= 32 ? 2 : 1;
  static constexpr int kWarps = kWords <= 128 ? 8 : 1;  // one where shared memory has to hold V
  using Type = Shape<kWarps, kSpans, (kWords * kSpans <= 64 ? 2 : 1), 3>;
};
template <class B, int kRank>
struct Choice<float, B, kRank> {
  // Two parts of V, three at rank 16, for 128 bytes.
  static constexpr int kWords = (kRank == 16 ? 3 : 2) * 4 * (kRank / 16) * 2;
  static constexpr int kWarps = kWords <= 128 ? 4 : 1;
  using Type = Shape<kWarps, 2, (kWords <= 64 ? 4 : kWords <= 128 ? 2 : 1), 3>;
};
template <class W, class B, int kRank>
using Chosen = typename Choice<W, B, kRank>::Type;

// kFew: worth kernels of their own for short lists.
template <class T, Access kAccess, bool kFew>
UpdateKernel kernel() {
  using Few = std::conditional_t<kFew, FewItems, ManyItems>;
  const auto few = [](auto* kernel) {
    return kFew ? reinterpret_cast<const void*>(kernel) : nullptr;
  };
  return {few(&lowrank_update_kernel<T, kAccess, Few>),
          reinterpret_cast<const void*>(&lowrank_update_kernel<T, kAccess, ManyItems>),
          few(&lowrank_left_kernel<T, Few>),
          reinterpret_cast<const void*>(&lowrank_left_kernel<T, ManyItems>),
          T::kWarps,
          T::kColumns,
          T::kResident,
          T::kStages,
          T::kRightBytes + (kAccess == Access::elements ? 0 : T::kWeightBytes),
          T::kP,
          T::kHalf};
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
  using C = Chosen<W, W, kRank>;
  constexpr int kWarps = C::kWarps, kSpans = C::kSpans, kResident = C::kResident;
  constexpr int kHalf = sizeof(W) == 4 ? 2 : 1;
  constexpr auto streaming = StoreHint::streaming;
  using Shapes = std::tuple<C,                                               // 0
                            Shape<kWarps, kSpans, kResident, 2>,             // 1
                            Shape<kWarps, kSpans, kResident, 4>,             // 2
                            Shape<kWarps, kSpans, kResident, 3, streaming>,  // 3
                            Shape<8, kSpans, kWarps * kResident / 8, 3>,     // 4
                            Shape<4, kSpans, kWarps * kResident / 4, 3>,     // 5
                            Shape<kWarps, kHalf, kResident, 3>>;             // 6
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
