// What a matrix product of one warp needs beside its instructions (instructions.cuh): pairs of
// 16-bit numbers, and numbers written as sums of bf16 parts.
#pragma once

#include <cuda_fp16.h>

#include "../dtypes.h"
#include "../philox.h"
#include "instructions.cuh"

namespace subzero::cuda {

// The largest of a warp's numbers.
__device__ __forceinline__ float largest_of(float x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, other));
  return x;
}

// ---- numbers as sums of parts

__device__ __forceinline__ float low_bf16(uint32_t packed) {
  return bits_float(packed << 16);
}
__device__ __forceinline__ float high_bf16(uint32_t packed) {
  return bits_float(packed & 0xffff0000u);
}

__device__ __forceinline__ __half2 half2_of(uint32_t packed) {
  return __half2(__half2_raw{static_cast<uint16_t>(packed), static_cast<uint16_t>(packed >> 16)});
}
__device__ __forceinline__ uint32_t bits_of(const __half2& pair) {
  const __half2_raw raw = pair;
  return static_cast<uint32_t>(raw.y) << 16 | raw.x;
}
__device__ __forceinline__ float2 unpack_f16(uint32_t packed) {
  return __half22float2(half2_of(packed));
}

// low and high as a sum of kParts bf16 numbers each, the larger part first: 8 bits of each number
// by every part, and the rest is at most 2^-(8 kParts + 1) of it or so.
template <int kParts>
__device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = pack_bf16(low, high);
    low -= low_bf16(parts[i]);
    high -= high_bf16(parts[i]);
  }
}

}  // namespace subzero::cuda
