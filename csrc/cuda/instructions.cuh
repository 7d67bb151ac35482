// The instructions that CUDA C++ has no name for: matrix products of one warp and the loads that
// fill their fragments, copies past the registers, 16 bytes of memory, launches that overlap. Needs
// sm_80. tests/emulator/instructions.cuh says in C++ what they do.
//
// Lane 4 q + t of mma.m16n8k16 holds, two 16-bit numbers to a register (the lower half first):
//     A (16 x 16)   rows q, q + 8, q, q + 8; columns 2t, 2t, 2t + 8, 2t + 8 and the next
//     B (16 x 8)    column q; rows 2t, 2t + 8 and the next
//     sum (16 x 8)  rows q, q, q + 8, q + 8; columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include <cstdint>

namespace subzero::cuda {

// ---- matrix products

using FragmentA = uint32_t[4];

// sum += A B in fp32, of bf16 or (kHalf) fp16 numbers.
template <bool kHalf>
__device__ __forceinline__ void mma(float (&sum)[4], const FragmentA& a, uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane 8 i + x gives the address of row x
// of matrix i. Register i then holds row q, columns 2t and 2t + 1 of matrix i; transposed: rows 2t
// and 2t + 1, column q.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or zeros, past the registers: nothing waits for them but
// wait_for_copies.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}

// Ends a group of a thread's copies.
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until all of the thread's groups but the last kPending have come.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- launches that overlap: the next kernel of a stream may start before this one ends

// Waits for the kernel before, whose memory is visible from here on.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start when all thread blocks have come here; it waits for their end itself.
__device__ __forceinline__ void allow_launch_after() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- memory

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// How memory that is read and written once passes the caches.
enum class LoadHint { none, streaming };
enum class StoreHint { none, streaming };

template <LoadHint kHint>
__device__ __forceinline__ Bytes16 load16(const void* from) {
  Bytes16 x;
  if constexpr (kHint == LoadHint::none)
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "l"(from));
  else
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "l"(from));
  return x;
}

template <StoreHint kHint>
__device__ __forceinline__ void store16(void* to, const Bytes16& x) {
  if constexpr (kHint == StoreHint::none)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.word[0]),
                 "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
  else
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.word[0]),
                 "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
}

// ---- conversion of two numbers, to nearest

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace subzero::cuda
