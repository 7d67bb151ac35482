// What the kernels and their host's side use of CUDA, on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "block.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- numbers that go together

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- in a kernel

static const emulator::Index& threadIdx = emulator::thread;
static const emulator::Index& blockIdx = emulator::block;
static const emulator::Index& blockDim = emulator::block_size;
static const emulator::Index& gridDim = emulator::grid_size;

using std::max;
using std::min;

inline void __syncthreads() {
  emulator::sync_block();
}

inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  struct In {
    float x;
    int mask;
  };
  return emulator::of_warp<float>(In{x, mask}, [](const In* in, float* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ in[lane].mask].x;
  });
}

// ---- on the host. Errors are texts.

#define CUDART_VERSION 13000

using cudaError_t = const char*;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = nullptr;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error;
}
inline const char* cudaGetErrorName(cudaError_t) {
  return "emulator";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::device.block_bytes ? cudaSuccess : "a block has less shared memory";
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kReserved = 1 << 10;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::device.processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::device.block_bytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulator::device.block_bytes + kReserved;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReserved;
      break;
  }
  return cudaSuccess;
}

// Kernels take their parameters by reference (tests/emulated_cuda.py), so one type calls any.
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  using Kernel = void (*)(void*, void*, void*);
  const auto call = reinterpret_cast<Kernel>(const_cast<void*>(kernel));
  const dim3 grid = config->gridDim, threads = config->blockDim;
  return emulator::launch({grid.x, grid.y, grid.z}, static_cast<int>(threads.x),
                          static_cast<int>(config->dynamicSmemBytes),
                          [&] { call(arguments[0], arguments[1], arguments[2]); });
}
