// The instructions of sm_90a: copies of whole tiles by the tensor memory accelerator (TMA),
// barriers that count their bytes, products of a warpgroup (wgmma), clusters of thread blocks.
//
// Tiles lie in shared memory as TMA's 128-byte swizzle leaves them: rows of 64 16-bit numbers, 8 of
// them to 1,024 bytes, the 16-byte pieces of row i exchanged by i % 8. A and B of a product are
// such tiles, both with k along the row.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace subzero::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SUBZERO_HOPPER 1
#endif

// ---- barriers in shared memory, by their address there

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes new barriers visible to the cluster and to TMA.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and has the phase wait for `bytes` of copies.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at this barrier of block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// What other blocks wrote through registers is there for TMA, and the other way round.
__device__ __forceinline__ void order_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Has the cache fetch what will be read soon.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// ---- counters in global memory, for blocks that wait for each other

__device__ __forceinline__ void count_up(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_until(const int* counter, int count) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  } while (value < count);
}

// ---- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- copies

// A box of `map` at (row, column) to shared memory; its bytes count at `barrier`.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int row, int column,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to the same place of every block of the cluster in `blocks`, a bit each.
__device__ __forceinline__ void load_box_to(uint16_t blocks, uint32_t to, const CUtensorMap& map,
                                            int row, int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// ---- registers: what the warps that copy leave, those that compute take

template <int kCount>
__device__ __forceinline__ void take_registers() {
#ifdef SUBZERO_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void leave_registers() {
#ifdef SUBZERO_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// ---- products of a warpgroup: sum (64 x kColumns) += A (64 x 16) B^T (kColumns x 16)
//
// Lane 4 q + t of warp w holds of the sum, for each 8 columns, rows 16 w + q and that + 8, columns
// 2t and 2t + 1: four numbers, rows first.

// Where a tile lies, as wgmma takes it: the address, 1,024 bytes from 8 rows to the next, the
// swizzle. 16 columns further are 32 bytes: + 2.
__device__ __forceinline__ uint64_t describe_tile(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{64} << 32 | (address >> 4 & 0x3fff);
}

// The same for B with k across the rows: tiles of 64 columns follow each other, `next` bytes apart;
// 16 rows further are 2,048 bytes: + 128.
__device__ __forceinline__ uint64_t describe_tile_across(uint32_t address, uint32_t next) {
  return describe_tile(address) | uint64_t{next >> 4} << 16;
}

__device__ __forceinline__ void begin_products() {
#ifdef SUBZERO_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void end_products() {
#ifdef SUBZERO_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all groups of products but the last kPending are done.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
#ifdef SUBZERO_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

#define SUBZERO_NAMES10(tens)                                                             \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, %" #tens "7, %" #tens "8, %" #tens "9"
#define SUBZERO_SUMS2(i) "+f"(sum[i]), "+f"(sum[i + 1])
#define SUBZERO_SUMS4(i) SUBZERO_SUMS2(i), SUBZERO_SUMS2(i + 2)
#define SUBZERO_SUMS8(i) SUBZERO_SUMS4(i), SUBZERO_SUMS4(i + 4)
#define SUBZERO_SUMS16(i) SUBZERO_SUMS8(i), SUBZERO_SUMS8(i + 8)
#define SUBZERO_SUMS32(i) SUBZERO_SUMS16(i), SUBZERO_SUMS16(i + 16)
#define SUBZERO_SUMS64(i) SUBZERO_SUMS32(i), SUBZERO_SUMS32(i + 32)
#define SUBZERO_PRODUCT(columns, type, transposed, names, a_name, b_name, ...)                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names \
               "}, " a_name ", " b_name ", 1, 1, 1, 0, " transposed ";"                         \
               : __VA_ARGS__                                                                    \
               : "l"(a), "l"(b))

// kAlong: B's tile has k along the row, else across.
template <bool kHalf, int kColumns, bool kAlong = true>
struct Product;

#define SUBZERO_DEFINE_PRODUCT(columns, names, a_name, b_name, ...)                   \
  template <bool kHalf, bool kAlong>                                                  \
  struct Product<kHalf, columns, kAlong> {                                            \
    static __device__ __forceinline__ void add(float (&sum)[columns / 2], uint64_t a, \
                                               uint64_t b) {                          \
      if constexpr (kHalf && kAlong)                                                  \
        SUBZERO_PRODUCT(columns, "f16", "0", names, a_name, b_name, __VA_ARGS__);     \
      else if constexpr (kHalf)                                                       \
        SUBZERO_PRODUCT(columns, "f16", "1", names, a_name, b_name, __VA_ARGS__);     \
      else if constexpr (kAlong)                                                      \
        SUBZERO_PRODUCT(columns, "bf16", "0", names, a_name, b_name, __VA_ARGS__);    \
      else                                                                            \
        SUBZERO_PRODUCT(columns, "bf16", "1", names, a_name, b_name, __VA_ARGS__);    \
    }                                                                                 \
  }

#define SUBZERO_NAMES40 \
  SUBZERO_NAMES10() ", " SUBZERO_NAMES10(1) ", " SUBZERO_NAMES10(2) ", " SUBZERO_NAMES10(3)
#define SUBZERO_NAMES60 SUBZERO_NAMES40 ", " SUBZERO_NAMES10(4) ", " SUBZERO_NAMES10(5)
#define SUBZERO_NAMES80 SUBZERO_NAMES60 ", " SUBZERO_NAMES10(6) ", " SUBZERO_NAMES10(7)
#define SUBZERO_NAMES120                                                                \
  SUBZERO_NAMES80 ", " SUBZERO_NAMES10(8) ", " SUBZERO_NAMES10(9) ", " SUBZERO_NAMES10( \
      10) ", " SUBZERO_NAMES10(11)

#ifdef SUBZERO_HOPPER
SUBZERO_DEFINE_PRODUCT(
    64, SUBZERO_NAMES10() ", " SUBZERO_NAMES10(1) ", " SUBZERO_NAMES10(2) ", %30, %31", "%32",
    "%33", SUBZERO_SUMS32(0));
SUBZERO_DEFINE_PRODUCT(128, SUBZERO_NAMES60 ", %60, %61, %62, %63", "%64", "%65",
                       SUBZERO_SUMS64(0));
SUBZERO_DEFINE_PRODUCT(160, SUBZERO_NAMES80, "%80", "%81", SUBZERO_SUMS64(0), SUBZERO_SUMS16(64));
SUBZERO_DEFINE_PRODUCT(192,
                       SUBZERO_NAMES80 ", " SUBZERO_NAMES10(8) ", %90, %91, %92, %93, %94, %95",
                       "%96", "%97", SUBZERO_SUMS64(0), SUBZERO_SUMS32(64));
SUBZERO_DEFINE_PRODUCT(256, SUBZERO_NAMES120 ", %120, %121, %122, %123, %124, %125, %126, %127",
                       "%128", "%129", SUBZERO_SUMS64(0), SUBZERO_SUMS64(64));
#else
template <bool kHalf, int kColumns, bool kAlong>
struct Product {
  static __device__ __forceinline__ void add(float (&)[kColumns / 2], uint64_t, uint64_t) {}
};
#endif

}  // namespace subzero::cuda
