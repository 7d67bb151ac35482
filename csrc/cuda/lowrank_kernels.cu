// The kernels of one dtype of W and one class of ranks: CMake compiles this file for each pair,
// with SUBZERO_WEIGHT (float, bf16 or f16) and SUBZERO_RANK defined.
#include "lowrank_kernel.cuh"

namespace subzero::cuda {
namespace {

// Two warps beside each other make rows of 256 bytes: on an H100 that was faster for 16-bit weights
// up to rank 64, slower at rank 128, and now the one, now the other for fp32. A tile row of a warp
// is a cache line.
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

template <class W, class B, int kRank>
UpdateKernel kernel(Access access) {
  using T = UpdateTraits<W, B, kRank, Chosen<W, B, kRank>>;
  constexpr bool kFew = sizeof(W) == sizeof(B);
  if (access == Access::elements) return kernel<T, Access::elements, false>();
  if constexpr (sizeof(W) == 2)
    if (access == Access::stochastic) return kernel<T, Access::stochastic, kFew>();
  return kernel<T, Access::nearest, kFew>();
}

}  // namespace

template <class W, int kRank>
UpdateKernel update_kernel(bool wide, Access access) {
  return wide ? kernel<W, float, kRank>(access) : kernel<W, W, kRank>(access);
}

template UpdateKernel update_kernel<SUBZERO_WEIGHT, SUBZERO_RANK>(bool, Access);

}  // namespace subzero::cuda
