// The generator for kernels that make much noise: what philox.h's block_words and block_normals
// give, with everything that neighbouring blocks share taken out of the loop.
#pragma once

#include "../philox.h"

namespace subzero::cuda {

// A 64-bit product. Written in C++ it costs an addition more: the high half of the constant's zero.
__device__ __forceinline__ void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p;}"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
#else
  const uint64_t product = uint64_t{a} * b;
  low = static_cast<uint32_t>(product), high = static_cast<uint32_t>(product >> 32);
#endif
}

// The round keys of a seed.
struct RoundKeys {
  uint32_t even[10];
  uint32_t odd[10];

  __device__ __forceinline__ explicit RoundKeys(uint64_t seed) {
#pragma unroll
    for (int i = 0; i < 10; ++i) {
      even[i] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
      odd[i] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

// The blocks of one stream and draw whose numbers share the upper 32 bits. Only the lower ones
// differ, so the first rounds are half done.
class Blocks {
 public:
  __device__ __forceinline__ Blocks(const RoundKeys& keys, uint32_t stream, uint32_t draw,
                                    uint32_t high) {
    uint32_t low_product, high_product;
    multiply(kOdd, stream, low_product, high_product);
    multiply(kEven, high_product ^ high ^ keys.even[0], third_, second_);
    first_ = draw ^ keys.odd[0];
    first_even_ = low_product ^ keys.even[1];
    second_ ^= keys.odd[1];
    third_ ^= keys.odd[2];
  }

  // The same blocks of another draw, which is one instruction.
  __device__ __forceinline__ Blocks at_draw(const RoundKeys& keys, uint32_t draw) const {
    Blocks other = *this;
    other.first_ = draw ^ keys.odd[0];
    return other;
  }

  __device__ __forceinline__ Words words(const RoundKeys& keys, uint32_t low) const {
    uint32_t c0, c1, c2, c3, low0, high0, low1, high1;
    multiply(kEven, low, low0, high0);
    multiply(kOdd, high0 ^ first_, low1, high1);
    c0 = high1 ^ first_even_, c1 = low1, c2 = second_ ^ low0;
    multiply(kEven, c0, low0, high0);
    multiply(kOdd, c2, low1, high1);
    c0 = high1 ^ c1 ^ keys.even[2], c1 = low1, c2 = high0 ^ third_, c3 = low0;
#pragma unroll
    for (int i = 3; i < 10; ++i) {
      multiply(kEven, c0, low0, high0);
      multiply(kOdd, c2, low1, high1);
      c0 = high1 ^ c1 ^ keys.even[i], c1 = low1;
      c2 = high0 ^ c3 ^ keys.odd[i], c3 = low0;
    }
    return {{c0, c1, c2, c3}};
  }

  __device__ __forceinline__ Normals normals(const RoundKeys& keys, uint32_t low) const {
    return normals_of(words(keys, low));
  }

 private:
  static constexpr uint32_t kEven = 0xD2511F53u, kOdd = 0xCD9E8D57u;
  uint32_t first_, first_even_, second_, third_;
};

}  // namespace subzero::cuda
