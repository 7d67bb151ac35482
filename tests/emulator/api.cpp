// perturb_many_ and fold_ for tests/emulated_cuda.py: as csrc/bindings.cpp, without Python.
#include <cstdint>
#include <vector>

#include "csrc/cuda/lowrank_update.cuh"

using namespace subzero;

namespace {

// An error's text; Python reads it before the next call.
Status status;

const char* text_of(const Status& given) {
  status = given;
  return status.ok ? nullptr : status.message;
}

// Scratch at 16 bytes, of which nothing is known before kernels write it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : words_(static_cast<size_t>(bytes / 16 + 1), Words16{-1, -1}) {}
  void* data() { return words_.data(); }

 private:
  struct alignas(16) Words16 {
    int64_t low, high;
  };
  std::vector<Words16> words_;
};

}  // namespace

extern "C" {

void set_device(int processors, int block_bytes) {
  emulator::device = {processors, block_bytes};
}

const char* perturb_many(const LowRank* items, int64_t count, const float* coeff, int64_t queries,
                         const int64_t* rng, int stochastic) {
  cuda::LowRankPlan plan;
  const Status prepared = plan.prepare(items, count, 0);
  if (!prepared.ok) return text_of(prepared);
  Scratch scratch(plan.scratch_bytes(queries));
  const auto rounding = stochastic ? Rounding::stochastic : Rounding::nearest;
  return text_of(plan.perturb_({coeff, queries, rng}, rounding, scratch.data(), {}));
}

const char* fold(const LowRank* item, const float* core, double decay, const int64_t* rng,
                 int stochastic) {
  cuda::LowRankPlan plan;
  const Status prepared = plan.prepare(item, 1, 0);
  if (!prepared.ok) return text_of(prepared);
  Scratch scratch(plan.scratch_bytes(0));
  const auto rounding = stochastic ? Rounding::stochastic : Rounding::nearest;
  return text_of(plan.fold_({*item, core, decay, rounding, rng}, scratch.data(), {}));
}

}  // extern "C"
