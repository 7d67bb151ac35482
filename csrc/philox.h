// The counter-based random numbers of the project: one definition for host and device.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011). Element e of a tensor (row-major index in the whole tensor) is word e % 4 of the block
//
//     counter = (block low 32, block high 32, stream, draw)   with block = e / 4
//     key     = (seed low 32, seed high 32)
//
// and the words of a block become four standard normals by Box and Muller's transform, in fp32:
// the pairs (w0, w1) and (w2, w3), called (a, b), give
//
//     u = fma(float(a >> 8), 2^-24, 2^-25)        t = float(b >> 8) * 2^-24
//     z_even = sqrt(-2 ln u) cos(2 pi t)          z_odd = sqrt(-2 ln u) sin(2 pi t)
//
// Every platform must give the same bits, so nothing here calls a math library: ln, sin and cos
// are fma polynomials (fit_polynomials.py made their coefficients), fma is fused exactly where it
// is written, and everything else is one correctly rounded IEEE operation. That holds if the
// compiler keeps its hands off: -ffp-contract=off for hosts, --fmad=false for nvcc, no fast math.
//
// Largest errors over all 2^24 inputs, against float64 (test_native_rng.py measures them):
//     ln 0.86 ulp      sin 0.99 ulp      cos 0.99 ulp
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SUBZERO_HD __host__ __device__ __forceinline__
#else
#define SUBZERO_HD inline __attribute__((always_inline))
#endif

namespace subzero {

struct Words {
  uint32_t w[4];
};

// Where a tensor's noise comes from: everything of the counter and key but the block.
struct NoiseSource {
  uint32_t key[2];
  uint32_t stream;
  uint32_t draw;
};

// rng = [seed, draw], the op argument; query k reads draw + k.
static SUBZERO_HD NoiseSource noise_source(const int64_t* rng, uint32_t stream, int64_t query = 0) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  const uint64_t draw = static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(query);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          stream,
          static_cast<uint32_t>(draw)};
}

// Purpose 4 of the contract: the words that decide stochastic rounding of a parameter.
static SUBZERO_HD uint32_t rounding_stream(uint32_t stream) {
  return (4u << 28) | (stream & 0x0fffffffu);
}

// ---- words

static SUBZERO_HD constexpr Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The known answers that Random123 ships for Philox4x32-10.
struct GoldenVector {
  Words counter;
  uint32_t key[2];
  Words words;
};
constexpr GoldenVector kGoldenVectors[] = {
    {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
    {{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}},
     {0xffffffffu, 0xffffffffu},
     {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
    {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
     {0xa4093822u, 0x299f31d0u},
     {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
};

constexpr bool golden(const GoldenVector& known) {
  const Words got = philox4x32_10(known.counter, known.key[0], known.key[1]);
  return got.w[0] == known.words.w[0] && got.w[1] == known.words.w[1] &&
         got.w[2] == known.words.w[2] && got.w[3] == known.words.w[3];
}
static_assert(golden(kGoldenVectors[0]) && golden(kGoldenVectors[1]) && golden(kGoldenVectors[2]),
              "Philox4x32-10 does not give Random123's known answers");

static SUBZERO_HD Words block_words(const NoiseSource& source, uint64_t block) {
  return philox4x32_10({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                         source.stream, source.draw}},
                       source.key[0], source.key[1]);
}

// ---- exact fp32 arithmetic

static SUBZERO_HD uint32_t float_bits(float x) {
  uint32_t bits = 0;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static SUBZERO_HD float bits_float(uint32_t bits) {
  float x = 0;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// a b + c with one rounding. Hosts without the instruction (x86-64 before Haswell) take the exact
// double product and a sum rounded to odd, which a second rounding to fp32 cannot spoil (Boldo and
// Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Trans. Computers 2008).
static SUBZERO_HD float fma_(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * b;
  double sum = product + c;
  const double rest = sum - product;
  const double lost = (product - (sum - rest)) + (c - rest);
  uint64_t bits = 0;
  memcpy(&bits, &sum, sizeof bits);
  const bool inexact = lost > 0 || lost < 0;  // not for infinities and NaN, where lost is NaN
  const bool away = (lost > 0) == (sum > 0);
  bits += (inexact && !(bits & 1)) ? (away ? uint64_t{1} : ~uint64_t{0}) : uint64_t{0};
  memcpy(&sum, &bits, sizeof sum);
  return static_cast<float>(sum);
#endif
}

// The square root of zero or of a normal number from 2^-50 to 2^50, correctly rounded.
static SUBZERO_HD float sqrt_(float x) {
#if defined(__CUDA_ARCH__)
  // What __fsqrt_rn does for such numbers, without its branch for all others. The added 2^-80 is
  // lost in them and keeps the root of zero, of either sign, from being 0 times infinity.
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x + 0x1p-80f));
  const float root = x * inverse;
  return fma_(fma_(-root, root, x), inverse * 0.5f, root);
#else
  return __builtin_sqrtf(x);  // one instruction under -fno-math-errno
#endif
}

// From 1 to 2: the number whose mantissa is those bits of x that `mask` has.
static SUBZERO_HD float one_and(uint32_t x, uint32_t mask) {
#if defined(__CUDA_ARCH__)  // one instruction, of which the compiler makes two
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, 0x3f800000, 0xea;" : "=r"(bits) : "r"(x), "r"(mask));
  return bits_float(bits);
#else
  return bits_float((x & mask) | 0x3f800000u);
#endif
}

// `yes` if x has any bit of `mask`, else `no`.
static SUBZERO_HD float if_bit(uint32_t x, uint32_t mask, float yes, float no) {
#if defined(__CUDA_ARCH__)  // the test is one instruction, of which the compiler makes three
  float chosen;
  asm("{.reg .pred p; .reg .b32 t; and.b32 t, %1, %2; setp.ne.u32 p, t, 0; selp.f32 %0, %3, %4, p;}"
      : "=f"(chosen)
      : "r"(x), "r"(mask), "f"(yes), "f"(no));
  return chosen;
#else
  return x & mask ? yes : no;
#endif
}

// ---- uniforms and elementary functions

// In (0, 1]: the largest word gives exactly 1, whose logarithm is 0.
static SUBZERO_HD float uniform_open(uint32_t word) {
  return fma_(static_cast<float>(static_cast<int32_t>(word >> 8)), 0x1p-24f, 0x1p-25f);
}

// 2 ln u for normal u > 0. With u = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2):
// ln u = e ln 2 + f - f^2 / 2 + f^3 p(f). Twice that costs nothing, as all factors 2 are exact.
static SUBZERO_HD float twice_ln(float u) {
  const uint32_t bits = float_bits(u);
  const uint32_t exponent = (bits - 0x3f3504f3u) & 0xff800000u;  // e 2^23; 0x3f3504f3: sqrt(1/2)
  const float f = bits_float(bits - exponent) - 1.0f;
  const float n = static_cast<float>(static_cast<int32_t>(exponent));
  const float f2 = f * f;
  float p = -0x1.38b580p-3f;
  p = fma_(p, f, 0x1.055b6ap-2f);
  p = fma_(p, f, -0x1.0d8542p-2f);
  p = fma_(p, f, 0x1.22da1cp-2f);
  p = fma_(p, f, -0x1.547244p-2f);
  p = fma_(p, f, 0x1.99a008p-2f);
  p = fma_(p, f, -0x1.000226p-1f);
  p = fma_(p, f, 0x1.555554p-1f);
  float tail = fma_(n, -0x1.05c610p-51f, p * (f2 * f));  // ln 2 in two floats: this is the lower
  tail = tail - f2;
  return fma_(n, 0x1.62e430p-23f, fma_(f, 2.0f, tail));
}

// r = sqrt(-2 ln u), -0 for u = 1.
static SUBZERO_HD float radius(uint32_t word) {
  return sqrt_(-twice_ln(uniform_open(word)));
}

struct Pair {
  float even;
  float odd;
};

// r cos(2 pi t) and r sin(2 pi t) for t = (word >> 8) 2^-24 turns. The quadrant is taken off the
// integer, so the reduction is exact and the multiples of a quarter turn give exact 0 and 1.
static SUBZERO_HD Pair on_circle(float r, uint32_t word) {
  const uint32_t moved = word + 0x20000000u;  // by 1/8 turn: its first two bits are the quadrant
  const float f = one_and(moved >> 7, 0x007ffffeu) - 1.5f;  // of a quadrant, |f| <= 1/2
  const float x = f * f;
  float s = -0x1.2dd048p-8f;
  s = fma_(s, x, 0x1.466032p-4f);
  s = fma_(s, x, -0x1.4abbc0p-1f);
  s = fma_(s, x, -0x1.777a5cp-25f);  // pi / 2 in two floats: this is the lower
  s = fma_(f, 0x1.921fb6p+0f, f * s);
  float c = 0x1.d9f7bcp-11f;
  c = fma_(c, x, -0x1.55c664p-6f);
  c = fma_(c, x, 0x1.03c1dep-2f);
  c = fma_(c, x, -0x1.3bd3ccp+0f);
  c = fma_(c, x, 1.0f);
  // The quadrants 2 and 3 are 0 and 1 with both signs changed; 1 and 3 have sine for cosine.
  r = bits_float(float_bits(r) ^ (moved & 0x80000000u));
  return {r * if_bit(moved, 0x40000000u, -s, c), r * if_bit(moved, 0x40000000u, c, s)};
}

// ---- normals

struct Normals {
  float z[4];
};

static SUBZERO_HD Normals normals_of(const Words& words) {
  const Pair first = on_circle(radius(words.w[0]), words.w[1]);
  const Pair second = on_circle(radius(words.w[2]), words.w[3]);
  return {{first.even, first.odd, second.even, second.odd}};
}

static SUBZERO_HD Normals block_normals(const NoiseSource& source, uint64_t block) {
  return normals_of(block_words(source, block));
}

}  // namespace subzero
