// The vector layer. Every file of this folder that does arithmetic is compiled once for each
// instruction set, into a namespace of its own (SUBZERO_ISA); dispatch.cpp picks one at run time.
//
// Rules for those files, which keep the variants apart and their results the same bits:
//   * no code from the standard library: the linker would merge inline functions of all variants
//     and an old processor could meet an AVX-512 copy. Helpers are static or in SUBZERO_ISA;
//   * every product-and-sum is an explicit fma_ or two rounded operations (-ffp-contract=off);
//   * an element's operations and their order do not depend on kLanes, tiles or threads.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../dtypes.h"
#include "../lowrank.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef SUBZERO_ISA
#define SUBZERO_ISA portable
#endif

namespace subzero::cpu::SUBZERO_ISA {

using subzero::fma_;

#if defined(__AVX512F__)

using Vec = __m512;
using DoubleVec = __m512d;
constexpr int kVectors = 4;  // vectors across a register tile

static inline Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
static inline void store(float* p, Vec x) {
  _mm512_storeu_ps(p, x);
}
static inline Vec broadcast(float x) {
  return _mm512_set1_ps(x);
}
static inline Vec fma_(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline DoubleVec load_double(const float* p) {
  return _mm512_cvtps_pd(_mm256_loadu_ps(p));
}
static inline void store_rounded(float* p, DoubleVec x) {
  _mm256_storeu_ps(p, _mm512_cvtpd_ps(x));
}
static inline DoubleVec broadcast(double x) {
  return _mm512_set1_pd(x);
}
static inline DoubleVec add_exact_product(DoubleVec a, DoubleVec b, DoubleVec c) {
  return _mm512_fmadd_pd(a, b, c);
}

#elif defined(__AVX2__)

using Vec = __m256;
using DoubleVec = __m256d;
constexpr int kVectors = 2;

static inline Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
static inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x);
}
static inline Vec broadcast(float x) {
  return _mm256_set1_ps(x);
}
static inline Vec fma_(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline DoubleVec load_double(const float* p) {
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
}
static inline void store_rounded(float* p, DoubleVec x) {
  _mm_storeu_ps(p, _mm256_cvtpd_ps(x));
}
static inline DoubleVec broadcast(double x) {
  return _mm256_set1_pd(x);
}
static inline DoubleVec add_exact_product(DoubleVec a, DoubleVec b, DoubleVec c) {
  return _mm256_fmadd_pd(a, b, c);
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef double DoubleVec __attribute__((vector_size(16)));
#if defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

static inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, Vec x) {
  memcpy(p, &x, sizeof x);
}
static inline Vec broadcast(float x) {
  return Vec{x, x, x, x};
}
#if defined(__aarch64__)
static inline Vec fma_(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
// philox.h's fma_ without the instruction, four lanes at a time; out of line, as it is long.
static __attribute__((noinline, unused)) Vec fma_(Vec a, Vec b, Vec c) {
  typedef double Wide __attribute__((vector_size(32)));
  typedef long long Bits __attribute__((vector_size(32)));
  const Wide product = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  const Wide addend = __builtin_convertvector(c, Wide);
  const Wide sum = product + addend;
  const Wide rest = sum - product;
  const Wide lost = (product - (sum - rest)) + (addend - rest);
  const Bits up = lost > 0, inexact = up | (lost < 0), same_side = ~(up ^ (sum > 0));
  const Bits even = ((Bits)sum & 1) - 1;
  const Bits odd = (Bits)sum + (((same_side & 2) - 1) & inexact & even);
  return __builtin_convertvector((Wide)odd, Vec);
}
#endif
static inline DoubleVec load_double(const float* p) {
  return DoubleVec{p[0], p[1]};
}
static inline void store_rounded(float* p, DoubleVec x) {
  p[0] = static_cast<float>(x[0]);
  p[1] = static_cast<float>(x[1]);
}
static inline DoubleVec broadcast(double x) {
  return DoubleVec{x, x};
}
// The factors are fp32 values, so the product is exact and this is what an fma gives.
static inline DoubleVec add_exact_product(DoubleVec a, DoubleVec b, DoubleVec c) {
  return a * b + c;
}

#endif

// Keeps the compiler from folding a load into each of its uses: six rows share one load.
static inline Vec in_register(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

constexpr int kLanes = sizeof(Vec) / sizeof(float);
constexpr int kDoubleLanes = sizeof(DoubleVec) / sizeof(double);

// ---- rows of a tensor's dtype to and from fp32

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<f16> = true;

template <class T>
static inline void load_row(const T* in, float* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (kIsHalf<T>)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
#endif
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

template <class T>
static inline void store_row(const float* in, T* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (kIsHalf<T>)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128((__m128i*)(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) round_nearest(in[i], out[i]);
}

template <class T>
static inline void store_row(const float* in, const uint32_t* words, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) round_stochastic(in[i], words[i], out[i]);
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the Type of a dtype.
template <class F>
static inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(Type<float>{});
    case Dtype::bfloat16:
      return f(Type<bf16>{});
    case Dtype::float16:
      return f(Type<f16>{});
  }
}

// ---- small helpers that the standard library would give

static inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// An aligned array that is freed with its scope; null where memory ran out.
template <class T>
struct Buffer {
  T* data = nullptr;
  bool allocate(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64);
    return posix_memalign(reinterpret_cast<void**>(&data), 64, static_cast<size_t>(bytes)) == 0;
  }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data); }
};

static inline Status failure(const char* message) {
  Status status;
  status.ok = false;
  strncpy(status.message, message, sizeof status.message - 1);
  return status;
}

}  // namespace subzero::cpu::SUBZERO_ISA
