// What every CUDA op needs around its kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#include "../lowrank.h"

namespace subzero::cuda {

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
    // Reported here: what stays with the runtime would be taken for the next launch's error.
    if (error_ != cudaSuccess) cudaGetLastError();
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

inline Status status_of(cudaError_t error) {
  Status status;
  if (error == cudaSuccess) return status;
  status.ok = false;
  std::snprintf(status.message, sizeof status.message, "%s (%s)", cudaGetErrorString(error),
                cudaGetErrorName(error));
  return status;
}

inline Status failure(const char* message) {
  Status status;
  status.ok = false;
  std::snprintf(status.message, sizeof status.message, "%s", message);
  return status;
}

constexpr int kThreads = 256;

// Blocks for a grid-stride loop over `items`: enough to fill any GPU many times over.
inline unsigned grid_for(int64_t items) {
  constexpr int64_t kMost = 1 << 16;
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

__device__ __forceinline__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t item_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace subzero::cuda
