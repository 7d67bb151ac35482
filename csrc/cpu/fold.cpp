#include "lowrank_update.h"
#include "ops.h"

namespace subzero::cpu::SUBZERO_ISA {

static void copy_core(const void* core, int64_t, int64_t first, int64_t count, float* values) {
  memcpy(values, static_cast<const float*>(core) + first,
         static_cast<size_t>(count) * sizeof(float));
}

Status fold_(const Fold& args, const Launch& launch) {
  Update update{args.item, args.decay, false, {}};
  update.stochastic = args.rounding == Rounding::stochastic && args.item.w.dtype != Dtype::float32;
  if (update.stochastic)
    update.rounding = noise_source(args.rng, rounding_stream(args.item.stream));
  return update_many(&update, 1, launch.threads, copy_core, args.core);
}

}  // namespace subzero::cpu::SUBZERO_ISA
