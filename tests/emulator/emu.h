#pragma once
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#include <algorithm>
#include <type_traits>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __shared__ static
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
using std::min; using std::max;
inline int64_t min(int64_t a, long long b) { return a < b ? a : b; }
typedef int cudaError_t; typedef void* cudaStream_t;
enum { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrReservedSharedMemoryPerBlock = 111 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
#define CUDART_VERSION 13000
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return 0; }
inline cudaError_t cudaSetDevice(int) { return 0; }
extern int emu_processors;
extern int emu_block_bytes;
inline cudaError_t cudaDeviceGetAttribute(int* v, int a, int) { *v = a == 16 ? emu_processors : a == 75 ? 9 : a == 97 ? emu_block_bytes : a == 81 ? emu_block_bytes + 1024 : 1024; return 0; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return 0; }
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return ""; }
inline const char* cudaGetErrorName(int) { return ""; }
extern dim3 threadIdx_, blockIdx_, blockDim_, gridDim_;
#define threadIdx threadIdx_
#define blockIdx blockIdx_
#define blockDim blockDim_
#define gridDim gridDim_
namespace emu {
constexpr int kSharedBytes = 1 << 18;
extern unsigned char memory[kSharedBytes];
extern int shared_limit;
void sync_block();
// each lane gives `in` and receives `out`; `f` computes all 32 from all 32, once
void warp(int op, const void* in, size_t in_size, void* out, size_t out_size,
          void (*f)(const unsigned char* in, unsigned char* out, const void* extra), const void* extra);
void launch(dim3 grid, dim3 block, int shared_bytes, const std::function<void()>& body);
void later(void* to, const void* from, bool real);
void finish_copies(int pending);
void end_copies();
}
inline cudaError_t emu_launch(const void* kernel, dim3 blocks, int threads, int shared_bytes, void** a) {
  emu::launch(blocks, dim3(threads), shared_bytes, [&] { ((void (*)(void*, void*, void*))kernel)(a[0], a[1], a[2]); });
  return 0;
}
inline cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return 0; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
#define __syncthreads() emu::sync_block()
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t all = (uint64_t)b << 32 | a; uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= (uint32_t)((all >> 8 * ((s >> 4 * i) & 7)) & 0xff) << 8 * i;
  return r;
}
inline float __shfl_xor_sync(unsigned, float v, int mask) {
  float out;
  emu::warp(1000 + mask, &v, 4, &out, 4, [](const unsigned char* in, unsigned char* o, const void* e) {
    int m = *(const int*)e;
    for (int l = 0; l < 32; ++l) memcpy(o + 4 * l, in + 4 * (l ^ m), 4);
  }, &mask);
  return out;
}
inline float __shfl_sync(unsigned, float v, int from) {
  float out;
  emu::warp(2000 + from, &v, 4, &out, 4, [](const unsigned char* in, unsigned char* o, const void* e) {
    int m = *(const int*)e;
    for (int l = 0; l < 32; ++l) memcpy(o + 4 * l, in + 4 * m, 4);
  }, &from);
  return out;
}
