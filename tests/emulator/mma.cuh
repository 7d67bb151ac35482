#pragma once
#include "emu.h"
#include "../dtypes.h"
#include "../philox.h"
namespace subzero::cuda {
using FragmentA = uint32_t[4];
template <bool kHalf> inline float num(uint16_t b) { if (kHalf) { f16 x{b}; return to_float(x); } bf16 x{b}; return to_float(x); }
template <bool kHalf>
inline void mma(float (&sum)[4], const FragmentA& a, uint32_t b0, uint32_t b1) {
  struct In { uint32_t a[4], b[2]; float c[4]; } in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
  float out[4];
  emu::warp(1 + kHalf, &in, sizeof in, out, sizeof out, [](const unsigned char* i, unsigned char* o, const void*) {
    const In* in = (const In*)i; float* out = (float*)o;
    // PTX ISA: fragments of m16n8k16 by element
    static float A[16][16], B[16][8];
    for (int l = 0; l < 32; ++l) {
      int g = l >> 2, t = l & 3;
      for (int e = 0; e < 8; ++e) {
        int row = (e < 2 || (e >= 4 && e < 6)) ? g : g + 8;
        int col = t * 2 + (e & 1) + (e >= 4 ? 8 : 0);
        A[row][col] = num<kHalf>((uint16_t)(in[l].a[e / 2] >> 16 * (e % 2)));
      }
      for (int e = 0; e < 4; ++e) {
        int row = t * 2 + (e & 1) + (e >= 2 ? 8 : 0);
        B[row][g] = num<kHalf>((uint16_t)(in[l].b[e / 2] >> 16 * (e % 2)));
      }
    }
    for (int l = 0; l < 32; ++l) for (int e = 0; e < 4; ++e) {
      int row = e < 2 ? l >> 2 : (l >> 2) + 8, col = (l & 3) * 2 + (e & 1);
      static const int mode = getenv("EMU_TRUNC") ? atoi(getenv("EMU_TRUNC")) : 0;
      double s = in[l].c[e];
      if (!mode) {
        for (int k = 0; k < 16; ++k) s += (double)A[row][k] * B[k][col];
        out[4 * l + e] = (float)s;
        continue;
      }
      // blocks of 8: everything aligned to the largest, cut off `mode - 1` bits below fp32's last
      for (int k0 = 0; k0 < 16; k0 += 8) {
        double most = std::fabs(s);
        for (int k = k0; k < k0 + 8; ++k) most = std::max(most, std::fabs((double)A[row][k] * B[k][col]));
        if (most == 0) continue;
        int x; std::frexp(most, &x);
        double unit = std::ldexp(1.0, x - 24 - (mode - 1)), total = std::trunc(s / unit);
        for (int k = k0; k < k0 + 8; ++k) total += std::trunc((double)A[row][k] * B[k][col] / unit);
        s = total * unit;
        if (s != 0) { std::frexp(s, &x); unit = std::ldexp(1.0, x - 24); s = std::trunc(s / unit) * unit; }
      }
      out[4 * l + e] = (float)s;
    }
  }, nullptr);
  memcpy(sum, out, sizeof out);
}
inline void matrices(uint32_t (&out)[4], uint32_t address, bool trans) {
  if (address % 16 || (int)address + 16 > emu::shared_limit) { fprintf(stderr, "ldmatrix address %u of %d\n", address, emu::shared_limit); abort(); }
  uint32_t got[4];
  emu::warp(10 + trans, &address, 4, got, 16, [](const unsigned char* i, unsigned char* o, const void* e) {
    const uint32_t* in = (const uint32_t*)i; uint32_t* out = (uint32_t*)o; bool trans = *(const bool*)e;
    for (int m = 0; m < 4; ++m) {
      uint16_t M[8][8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) { memcpy(M[r], emu::memory + in[8 * m + r], 16); banks |= 1u << (in[8 * m + r] / 16 % 8); }
      if (banks != 0xff) { static bool said; if (!said) fprintf(stderr, "bank conflict\n"); said = true; }
      for (int l = 0; l < 32; ++l) {
        uint32_t lo, hi;
        if (!trans) lo = M[l / 4][2 * (l % 4)], hi = M[l / 4][2 * (l % 4) + 1];
        else lo = M[2 * (l % 4)][l / 4], hi = M[2 * (l % 4) + 1][l / 4];
        out[4 * l + m] = hi << 16 | lo;
      }
    }
  }, &trans);
  memcpy(out, got, 16);
}
inline void load_matrices(uint32_t (&out)[4], uint32_t a) { matrices(out, a, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t a) { matrices(out, a, true); }
inline uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - emu::memory); }
template <bool kWide = false> inline void copy_async(uint32_t to, const void* from, bool real) {
  if (to % 16 || (int)to + 16 > emu::shared_limit || (real && (uintptr_t)from % 16)) { fprintf(stderr, "cp.async %u %p\n", to, from); abort(); }
  emu::later(emu::memory + to, from, real);
}
inline void fetch_to_l2(const void* f, int n) { if ((uintptr_t)f % 16 || n % 16 || n <= 0) abort(); volatile char c = ((const char*)f)[n - 1]; (void)c; }
inline void wait_for_launch_before() {}
inline void allow_launch_after() {}
inline void end_copies() { emu::end_copies(); }
template <int kPending> inline void wait_for_copies() { emu::finish_copies(kPending); }
inline float largest_of(float x) { for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o)); return x; }
inline uint32_t pack_bf16(float low, float high) { bf16 a, b; round_nearest(low, a); round_nearest(high, b); return (uint32_t)b.bits << 16 | a.bits; }
inline uint32_t pack_f16(float low, float high) { f16 a, b; round_nearest(low, a); round_nearest(high, b); return (uint32_t)b.bits << 16 | a.bits; }

inline float low_bf16(uint32_t p) { return bits_float(p << 16); }
inline float high_bf16(uint32_t p) { return bits_float(p & 0xffff0000u); }
inline float2 unpack_f16(uint32_t p) { return {to_float(f16{(uint16_t)p}), to_float(f16{(uint16_t)(p >> 16)})}; }
struct H2 { float x, y; };
using __half2 = H2;
inline H2 half2_of(uint32_t p) { auto f = unpack_f16(p); return {f.x, f.y}; }
inline uint32_t bits_of(const H2& h) { return pack_f16(h.x, h.y); }
inline H2 __hmul2(H2 a, H2 b) { return {a.x * b.x, a.y * b.y}; }
inline H2 __float2half2_rn(float x) { auto f = unpack_f16(pack_f16(x, x)); return {f.x, f.y}; }
template <int kParts>
inline void split(float low, float high, uint32_t (&parts)[kParts]) {
  for (int i = 0; i < kParts; ++i) { parts[i] = pack_bf16(low, high); low -= low_bf16(parts[i]); high -= high_bf16(parts[i]); }
}
}
