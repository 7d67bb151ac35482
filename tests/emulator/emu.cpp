#include "emu.h"
dim3 threadIdx_, blockIdx_, blockDim_, gridDim_;
int emu_processors = 3;
int emu_block_bytes = getenv("EMU_BLOCK_BYTES") ? atoi(getenv("EMU_BLOCK_BYTES")) : 232448;
namespace emu {
alignas(16) unsigned char memory[kSharedBytes];
int shared_limit = 0;
struct Copy { void* to; const void* from; bool real; long group; };
struct Fiber { ucontext_t ctx; std::vector<char> stack; bool done; unsigned tid; std::vector<Copy> copies; long block_gen; long group; };
struct Warp { int arrived = 0; long gen = 0; int op = 0; std::vector<unsigned char> in, out; };
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static ucontext_t main_ctx;
static int current, block_arrived; static long block_gen;
static const std::function<void()>* body_;
static void yield_() { int me = current; swapcontext(&fibers[me].ctx, &main_ctx); }
void sync_block() {
  long g = block_gen;
  if (++block_arrived == (int)fibers.size()) { block_arrived = 0; ++block_gen; return; }
  while (block_gen == g) yield_();
}
void warp(int op, const void* in, size_t is, void* out, size_t os, void (*f)(const unsigned char*, unsigned char*, const void*), const void* extra) {
  int me = current; Warp& w = warps[me / 32]; int lane = me % 32;
  long g = w.gen;
  if (w.arrived == 0) { w.op = op; w.in.assign(32 * is, 0); }
  if (w.op != op) { fprintf(stderr, "diverged: %d vs %d\n", w.op, op); abort(); }
  memcpy(w.in.data() + lane * is, in, is);
  if (++w.arrived == 32) { w.out.assign(32 * os, 0); f(w.in.data(), w.out.data(), extra); w.arrived = 0; ++w.gen; }
  else while (w.gen == g) yield_();
  memcpy(out, w.out.data() + lane * os, os);
  // nobody may start the next collective before all have read: out is overwritten only when all 32 arrive again
}
void later(void* to, const void* from, bool real) { fibers[current].copies.push_back({to, from, real, fibers[current].group}); }
void end_copies() { ++fibers[current].group; }
void finish_copies(int pending) {
  Fiber& f = fibers[current]; std::vector<Copy> rest;
  for (auto& c : f.copies) {
    if (c.group >= f.group - pending) { rest.push_back(c); continue; }
    if (c.real) memcpy(c.to, c.from, 16); else memset(c.to, 0, 16);
  }
  f.copies = rest;
}
static void entry() { (*body_)(); ++fibers[current].group; finish_copies(0); fibers[current].done = true; yield_(); }
void launch(dim3 grid, dim3 block, int shared_bytes, const std::function<void()>& body) {
  body_ = &body; shared_limit = shared_bytes;
  blockDim_ = block; gridDim_ = grid;
  int n = block.x;
  std::vector<int> order(n); for (int i = 0; i < n; ++i) order[i] = i;
  for (unsigned by = 0; by < grid.y; ++by) for (unsigned b = 0; b < grid.x; ++b) {
    for (int i = 0; i < kSharedBytes; i += 2) { memory[i] = 0xff; memory[i + 1] = 0xff; }  // NaN
    if ((int)fibers.size() != n) { fibers.clear(); fibers.resize(n); }
    warps.assign((n + 31) / 32, Warp());
    block_arrived = 0; block_gen = 0;
    for (int i = 0; i < n; ++i) {
      Fiber& f = fibers[i]; f.done = false; f.tid = i; f.copies.clear(); f.group = 0; f.stack.resize(256 << 10);
      getcontext(&f.ctx); f.ctx.uc_stack.ss_sp = f.stack.data(); f.ctx.uc_stack.ss_size = f.stack.size(); f.ctx.uc_link = &main_ctx;
      makecontext(&f.ctx, entry, 0);
    }
    int left = n;
    while (left) {
      // random order, warp by warp
      for (int i = n / 32 - 1; i > 0; --i) { int j = rand() % (i + 1); for (int l = 0; l < 32; ++l) std::swap(order[32 * i + l], order[32 * j + l]); }
      for (int x = 0; x < n; ++x) {
        int i = order[x]; if (fibers[i].done) continue;
        current = i; threadIdx_ = dim3(i, 0, 0); blockIdx_ = dim3(b, by, 0);
        swapcontext(&main_ctx, &fibers[i].ctx);
        if (fibers[i].done) --left;
      }
    }
    for (int i = shared_limit; i < kSharedBytes; ++i) if (memory[i] != 0xff) { fprintf(stderr, "shared memory overrun at %d of %d\n", i, shared_bytes); abort(); }
  }
}
}
