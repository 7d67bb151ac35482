#include "block.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

// What kernels declare as `extern __shared__`, and room behind it that nobody may write.
namespace subzero::cuda {
thread_local unsigned char shared[256 << 10] __attribute__((aligned(128)));
}

namespace emulator {

Device device;
Index thread, block, block_size, grid_size;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr unsigned char kNaN = 0xff;  // each byte of one, in any format

struct Copy {
  uint32_t to;
  const void* from;
  int group;
};

// A number that grows whenever those who wait for it may go on.
using Gate = int;

struct Fiber {
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStack);
  ucontext_t start;
  jmp_buf place;
  bool started, done;
  const Gate* gate;  // null, or what the fiber waits for as long as it is `seen`
  Gate seen;
  std::vector<Copy> copies;
  int group;  // of copies, that is not yet ended

  bool may_run() const { return !done && (gate == nullptr || *gate != seen); }
};

struct Meeting {
  int arrived = 0;
  Gate gate = 0;
  Collective all = nullptr;
  alignas(16) unsigned char in[kWarp * 64], out[kWarp * 16];
};

std::vector<Fiber> fibers;
std::vector<Meeting> meetings;
int current, at_barrier;
Gate barrier;
jmp_buf scheduler;
const std::function<void()>* body;
const char* error;

struct Bytes {
  unsigned char* first = nullptr;
  size_t count = 0;
};

// This library's thread-local memory, which is shared memory and nothing else.
Bytes shared_memory() {
  subzero::cuda::shared[0] = kNaN;  // a first access makes it exist
  Bytes found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        auto& bytes = *static_cast<Bytes*>(out);
        const auto* const inside = subzero::cuda::shared;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          auto* const first = static_cast<unsigned char*>(info->dlpi_tls_data);
          const size_t count = info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type == PT_TLS && first <= inside && inside < first + count)
            bytes = {first, count};
        }
        return 0;
      },
      &found);
  return found;
}

Bytes all_shared;

// _setjmp and _longjmp change stacks without a system call; ucontext only makes the first step.
void to_scheduler() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

void wait(const Gate& gate) {
  fibers[current].gate = &gate;
  fibers[current].seen = gate;
  to_scheduler();
}

void run_fiber() {
  (*body)();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

void resume(int index) {
  current = index;
  thread = {static_cast<unsigned>(index), 0, 0};
  Fiber& fiber = fibers[index];
  fiber.gate = nullptr;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void start(int threads) {
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.gate = nullptr;
    fiber.copies.clear();
    fiber.group = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  meetings.assign((threads + kWarp - 1) / kWarp, Meeting());
  at_barrier = 0;
}

// In each round the warps come in another order, and every other one runs as far as it gets: on a
// GPU too, one may be far ahead of the others or they may keep pace.
void run_block(int threads, std::mt19937& random) {
  std::vector<int> order(threads / kWarp);
  std::iota(order.begin(), order.end(), 0);
  start(threads);
  const auto step = [](int warp) {
    bool moved = false;
    for (int i = warp * kWarp; i < (warp + 1) * kWarp && error == nullptr; ++i)
      if (fibers[i].may_run()) moved = true, resume(i);
    return moved;
  };
  for (bool moved = true; moved && error == nullptr;) {
    moved = false;
    std::shuffle(order.begin(), order.end(), random);
    for (const int warp : order) {
      const bool far = random() % 2 == 0;
      while (error == nullptr && step(warp)) {
        moved = true;
        if (!far) break;
      }
    }
  }
  const auto all = fibers.begin() + threads;
  if (error == nullptr && !std::all_of(fibers.begin(), all, [](const Fiber& f) { return f.done; }))
    error = "threads wait for others that do not come";
}

}  // namespace

const char* launch(Index blocks, int threads, int shared_bytes,
                   const std::function<void()>& kernel) {
  all_shared = shared_memory();
  unsigned char* const unused = subzero::cuda::shared + shared_bytes;
  unsigned char* const end = std::end(subzero::cuda::shared);
  std::mt19937 random;
  body = &kernel;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  grid_size = blocks;
  error = threads % kWarp != 0                ? "a block of threads that are no whole warps"
          : shared_bytes > device.block_bytes ? "more shared memory than a block may have"
                                              : nullptr;
  for (block.y = 0; block.y < blocks.y && error == nullptr; ++block.y)
    for (block.x = 0; block.x < blocks.x && error == nullptr; ++block.x) {
      std::memset(all_shared.first, kNaN, all_shared.count);
      run_block(threads, random);
      if (error == nullptr &&
          !std::all_of(unused, end, [](unsigned char byte) { return byte == kNaN; }))
        error = "the kernel wrote behind its shared memory";
    }
  return error;
}

void fail(const char* message) {
  error = message;
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

void sync_block() {
  if (++at_barrier < static_cast<int>(block_size.x)) return wait(barrier);
  at_barrier = 0;
  ++barrier;
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - all_shared.first);
}

unsigned char* shared_bytes16(uint32_t address) {
  if (address % 16 != 0) fail("an address in shared memory that is no multiple of 16");
  if (address + size_t{16} > all_shared.count) fail("an address outside of shared memory");
  return all_shared.first + address;
}

void copy_later(uint32_t to, const void* from) {
  shared_bytes16(to);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a copy from a misaligned address");
  fibers[current].copies.push_back({to, from, fibers[current].group});
}

void end_copies() {
  ++fibers[current].group;
}

void wait_for_copies(int pending) {
  Fiber& fiber = fibers[current];
  const auto due =
      std::stable_partition(fiber.copies.begin(), fiber.copies.end(),
                            [&](const Copy& copy) { return copy.group < fiber.group - pending; });
  for (auto copy = fiber.copies.begin(); copy != due; ++copy) {
    unsigned char* const to = shared_bytes16(copy->to);
    if (copy->from != nullptr)
      std::memcpy(to, copy->from, 16);
    else
      std::memset(to, 0, 16);
  }
  fiber.copies.erase(fiber.copies.begin(), due);
}

void meet(const void* in, size_t in_bytes, void* out, size_t out_bytes, Collective all,
          const void* function) {
  Meeting& meeting = meetings[current / kWarp];
  const int lane = current % kWarp;
  if (in_bytes > 64 || out_bytes > 16) fail("a lane's part of an instruction is too large");
  if (meeting.arrived == 0) meeting.all = all;
  if (meeting.all != all) fail("the lanes of a warp come to different instructions");
  std::memcpy(meeting.in + lane * in_bytes, in, in_bytes);
  if (++meeting.arrived < kWarp) {
    wait(meeting.gate);
  } else {
    all(function, meeting.in, meeting.out);
    meeting.arrived = 0;
    ++meeting.gate;
  }
  // Results stay until all lanes have come to the next instruction.
  std::memcpy(out, meeting.out + lane * out_bytes, out_bytes);
}

}  // namespace emulator
