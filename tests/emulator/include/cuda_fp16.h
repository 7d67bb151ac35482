// What the kernels use of CUDA's fp16: two numbers to a register.
#pragma once

#include "csrc/dtypes.h"
#include "cuda_runtime.h"

struct __half2_raw {
  uint16_t x, y;
};

struct __half2 {
  __half2_raw raw;
  explicit __half2(const __half2_raw& from) : raw(from) {}
  operator __half2_raw() const { return raw; }
};

inline float2 __half22float2(const __half2& pair) {
  return {subzero::to_float(subzero::f16{pair.raw.x}), subzero::to_float(subzero::f16{pair.raw.y})};
}
