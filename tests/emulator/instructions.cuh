// csrc/cuda/instructions.cuh on a CPU: the same functions, by what the PTX manual says of their
// instructions. The build puts this file in that one's place.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtypes.h"
#include "cuda_runtime.h"

namespace subzero::cuda {

// ---- matrix products

using FragmentA = uint32_t[4];

// The lower (0) or upper (1) of two 16-bit numbers.
template <bool kHalf>
float number(uint32_t pair, int which) {
  using Number = std::conditional_t<kHalf, f16, bf16>;
  return to_float(Number{static_cast<uint16_t>(pair >> 16 * which)});
}

// Sums are exact until the end, where tensor cores cut some bits.
template <bool kHalf>
void mma(float (&sum)[4], const FragmentA& a, uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
    float sum[4];
  };
  struct Out {
    float sum[4];
  };
  const In mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
  const Out out = emulator::of_warp<Out>(mine, [](const In* in, Out* out) {
    float left[16][16], right[8][16];  // A, and B by columns
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 8; ++e) {
        const int q = lane / 4, k = lane % 4 * 2 + e % 2;
        left[q + e / 2 % 2 * 8][k + e / 4 * 8] = number<kHalf>(in[lane].a[e / 2], e % 2);
        if (e < 4) right[q][k + e / 2 * 8] = number<kHalf>(in[lane].b[e / 2], e % 2);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const float* const row = left[lane / 4 + e / 2 * 8];
        const float* const column = right[lane % 4 * 2 + e % 2];
        double total = in[lane].sum[e];
        for (int k = 0; k < 16; ++k) total += static_cast<double>(row[k]) * column[k];
        out[lane].sum[e] = static_cast<float>(total);
      }
  });
  std::memcpy(sum, out.sum, sizeof out.sum);
}

inline uint32_t shared_address(const void* pointer) {
  return emulator::shared_address(pointer);
}

// Eight addresses make one access to shared memory, which must use each bank once: nothing is
// wrong otherwise, but slow, and the layouts are made so that it does not happen.
template <bool kTransposed>
void load_matrices_either(uint32_t (&out)[4], uint32_t address) {
  emulator::shared_bytes16(address);
  struct Out {
    uint32_t matrix[4];
  };
  const Out got = emulator::of_warp<Out>(address, [](const uint32_t* address, Out* out) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) {
        std::memcpy(matrix[row], emulator::shared_bytes16(address[8 * i + row]), 16);
        banks |= 1u << address[8 * i + row] / 16 % 8;
      }
      if (banks != 0xff) emulator::fail("ldmatrix with a bank conflict");
      for (int lane = 0; lane < 32; ++lane) {
        const int q = lane / 4, t = lane % 4;
        const uint16_t low = kTransposed ? matrix[2 * t][q] : matrix[q][2 * t];
        const uint16_t high = kTransposed ? matrix[2 * t + 1][q] : matrix[q][2 * t + 1];
        out[lane].matrix[i] = static_cast<uint32_t>(high) << 16 | low;
      }
    }
  });
  std::memcpy(out, got.matrix, sizeof out);
}
inline void load_matrices(uint32_t (&out)[4], uint32_t address) {
  load_matrices_either<false>(out, address);
}
inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) {
  load_matrices_either<true>(out, address);
}

// ---- memory

inline void copy_async(uint32_t to, const void* from, bool real) {
  emulator::copy_later(to, real ? from : nullptr);
}
inline void end_copies() {
  emulator::end_copies();
}
template <int kPending>
void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

enum class StoreHint { none, streaming };

template <StoreHint kHint>
void store16(void* to, const Bytes16& x) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("a store to a misaligned address");
  std::memcpy(to, &x, sizeof x);
}

// ---- launches overlap: here they come one after another

inline void wait_for_launch_before() {}
inline void allow_launch_after() {}

// ---- conversion of two numbers, to nearest

template <class Number>
uint32_t pack(float low, float high) {
  Number a, b;
  round_nearest(low, a);
  round_nearest(high, b);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}
inline uint32_t pack_bf16(float low, float high) {
  return pack<bf16>(low, high);
}
inline uint32_t pack_f16(float low, float high) {
  return pack<f16>(low, high);
}

}  // namespace subzero::cuda
