// 16-bit storage: conversion to fp32, and the two roundings back. One definition for host and
// device; comparisons and integer arithmetic only, so every platform gives the same bits.
#pragma once

#include "philox.h"

namespace subzero {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static SUBZERO_HD float to_float(float x) {
  return x;
}

static SUBZERO_HD float to_float(bf16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

static SUBZERO_HD float to_float(f16 x) {
  // A product with 2^112 moves the exponent bias from 15 to 127, subnormals included.
  const uint32_t size = (x.bits & 0x7fffu) << 13;
  const uint32_t scaled = float_bits(bits_float(size) * 0x1p112f);
  const uint32_t special = size >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity or NaN
  const uint32_t quiet = size > 0x0f800000u ? 0x00400000u : 0u;
  return bits_float(scaled | special | quiet | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

// ---- to nearest, ties to even; NaN stays NaN, what is too large becomes infinite

static SUBZERO_HD void round_nearest(float x, float& out) {
  out = x;
}

static SUBZERO_HD void round_nearest(float x, bf16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static SUBZERO_HD void round_nearest(float x, f16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t rebiased = size - 0x38000000u;  // exponent bias 127 to 15
  const uint32_t kept = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;
  const uint32_t normal = kept < 0x7c00u ? kept : 0x7c00u;
  // Below 2^-14 the gap is 2^-24, which is the gap of fp32 in [1/2, 1).
  const uint32_t subnormal = float_bits(bits_float(size) + 0.5f) - 0x3f000000u;
  const uint32_t quiet = 0x7e00u | (size >> 13 & 0x3ffu);
  const uint32_t finite = size < 0x38800000u ? subnormal : normal;
  out.bits = static_cast<uint16_t>((size > 0x7f800000u ? quiet : finite) | (bits >> 16 & 0x8000u));
}

// ---- stochastic: away from zero iff float(word >> 8) 2^-24 < the fraction of the gap between the
// two neighbours. Representable values stay, finite stays finite, NaN and infinities pass.

static SUBZERO_HD void round_stochastic(float x, uint32_t, float& out) {
  out = x;
}

static SUBZERO_HD void round_stochastic(float x, uint32_t word, bf16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t size = bits & 0x7fffffffu;
  // The lower 16 bits are the fraction in 2^-16: both sides of the comparison times 2^24.
  const uint32_t up = (word >> 8) < (size & 0xffffu) << 8 ? 1u : 0u;
  const uint32_t rounded = (size >> 16) + up;
  const uint32_t finite = rounded < 0x7f80u ? rounded : 0x7f7fu;
  const uint32_t quiet = size >> 16 | (size > 0x7f800000u ? 0x40u : 0u);
  out.bits = static_cast<uint16_t>((size < 0x7f800000u ? finite : quiet) | (bits >> 16 & 0x8000u));
}

static SUBZERO_HD void round_stochastic(float x, uint32_t word, f16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t rebiased = size - 0x38000000u;
  const uint32_t up = (word >> 8) < (rebiased & 0x1fffu) << 11 ? 1u : 0u;
  const uint32_t kept = (rebiased >> 13) + up;
  const uint32_t normal = kept < 0x7c00u ? kept : 0x7bffu;
  // Below 2^-14: in units of the gap 2^-24, exact in fp32.
  const float steps = bits_float(size < 0x38800000u ? size : 0u) * 0x1p24f;
  const int32_t low = static_cast<int32_t>(steps);
  const float fraction = steps - static_cast<float>(low);
  const float uniform = static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
  const uint32_t subnormal = static_cast<uint32_t>(low) + (uniform < fraction ? 1u : 0u);
  const uint32_t finite = size < 0x38800000u ? subnormal : normal;
  const uint32_t special = size > 0x7f800000u ? 0x7e00u | (size >> 13 & 0x3ffu) : 0x7c00u;
  out.bits =
      static_cast<uint16_t>((size < 0x7f800000u ? finite : special) | (bits >> 16 & 0x8000u));
}

}  // namespace subzero
