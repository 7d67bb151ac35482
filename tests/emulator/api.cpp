#include "csrc/cuda/lowrank_update.cuh"
using namespace subzero;
struct Flat { int64_t w, wr, wc, ws, wd, u, ur, uc, us, ud, v, vr, vc, vs, vd, stream; };
static LowRank item(const Flat& f) {
  return {{(void*)f.w, f.wr, f.wc, f.ws, (Dtype)f.wd}, {(void*)f.u, f.ur, f.uc, f.us, (Dtype)f.ud}, {(void*)f.v, f.vr, f.vc, f.vs, (Dtype)f.vd}, (uint32_t)f.stream};
}
extern "C" int perturb(const Flat* flat, int64_t n, const float* coeff, int64_t k, const int64_t* rng, int stochastic, int processors) {
  emu_processors = processors;
  std::vector<LowRank> items; for (int i = 0; i < n; ++i) items.push_back(item(flat[i]));
  cuda::LowRankPlan plan; Status s = plan.prepare(items.data(), n, 0);
  if (!s.ok) { puts(s.message); return 1; }
  std::vector<char> scratch(plan.scratch_bytes(k) + 16);
  s = plan.perturb_({coeff, k, rng}, (Rounding)stochastic, (void*)(((uintptr_t)scratch.data() + 15) / 16 * 16), {});
  return !s.ok;
}
extern "C" int fold(const Flat* flat, const float* core, double decay, const int64_t* rng, int stochastic, int processors) {
  emu_processors = processors;
  LowRank one = item(*flat);
  cuda::LowRankPlan plan; Status s = plan.prepare(&one, 1, 0);
  if (!s.ok) { puts(s.message); return 1; }
  std::vector<char> scratch(plan.scratch_bytes(0) + 16);
  s = plan.fold_({one, core, decay, (Rounding)stochastic, rng}, (void*)(((uintptr_t)scratch.data() + 15) / 16 * 16), {});
  return !s.ok;
}
