// Weights in memory (16 bytes at a time: instructions.cuh): pairs of 16-bit numbers to and from
// fp32.
#pragma once

#include "mma.cuh"

namespace subzero::cuda {

// Two fp32 numbers in 16 bits each, to nearest.
__device__ __forceinline__ uint32_t round_pair(bf16, float low, float high) {
  return pack_bf16(low, high);
}
__device__ __forceinline__ uint32_t round_pair(f16, float low, float high) {
  return pack_f16(low, high);
}

// The same by words: dtypes.h's rule. bf16's, of the bits that go, is "away iff word / 2^16 <
// them", which is the carry of adding 2^16 - 1 - word / 2^16 to them.
__device__ __forceinline__ uint32_t round_pair(bf16, float low, float high, uint32_t low_word,
                                               uint32_t high_word) {
  const auto rounded = [](float x, uint32_t word) {
    const uint32_t bits = float_bits(x), size = bits & 0x7fffffffu;
    const uint32_t moved = min(size + (~word >> 16), 0x7f7fffffu);
    const uint32_t quiet = size | (size > 0x7f800000u ? 0x00400000u : 0u);
    return (size < 0x7f800000u ? moved : quiet) | (bits & 0x80000000u);
  };
  return __byte_perm(rounded(low, low_word), rounded(high, high_word), 0x7632);
}
__device__ __forceinline__ uint32_t round_pair(f16, float low, float high, uint32_t low_word,
                                               uint32_t high_word) {
  f16 a, b;
  round_stochastic(low, low_word, a);
  round_stochastic(high, high_word, b);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}

__device__ __forceinline__ float2 unpack(bf16, uint32_t pair) {
  return make_float2(low_bf16(pair), high_bf16(pair));
}
__device__ __forceinline__ float2 unpack(f16, uint32_t pair) {
  return unpack_f16(pair);
}

}  // namespace subzero::cuda
