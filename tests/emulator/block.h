// A launch on a CPU: thread blocks one after another, every thread of a block a fiber. A fiber runs
// until it has to wait for others, and what it waits for comes as late as the PTX manual allows.
//
// Shared memory is this library's thread-local memory: `extern thread_local` and `thread_local`
// are declarations as good as `extern __shared__` and `__shared__`. Each block starts with NaN in
// all of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// What the host's side asks the device for.
struct Device {
  int processors = 132;
  int block_bytes = 227 << 10;  // of shared memory
};
extern Device device;

// The running thread's coordinates.
extern Index thread, block, block_size, grid_size;

// Runs `kernel` in every thread. An error of the kernel, or null.
const char* launch(Index blocks, int threads, int shared_bytes,
                   const std::function<void()>& kernel);

// Ends the launch with an error.
[[noreturn]] void fail(const char* message);

// ---- what a thread may call

// All threads of the block have to come.
void sync_block();

// Where a pointer to shared memory lies in it, and back; 16 bytes from an address must exist.
uint32_t shared_address(const void* pointer);
unsigned char* shared_bytes16(uint32_t address);

// Copies of 16 bytes (zeros for null) into shared memory, which are made when they are waited for.
void copy_later(uint32_t to, const void* from);
void end_copies();
void wait_for_copies(int pending);

// All 32 lanes have to come with the same `all`, which gets the arguments and gives the results of
// all lanes.
using Collective = void (*)(const void* function, const void* in, void* out);
void meet(const void* in, size_t in_bytes, void* out, size_t out_bytes, Collective all,
          const void* function);

template <class Out, class In, class Function>
Out of_warp(const In& in, const Function& function) {
  Out out;
  const Collective all = [](const void* f, const void* ins, void* outs) {
    (*static_cast<const Function*>(f))(static_cast<const In*>(ins), static_cast<Out*>(outs));
  };
  meet(&in, sizeof in, &out, sizeof out, all, &function);
  return out;
}

}  // namespace emulator
