#include "lowrank_update.h"
#include "ops.h"

namespace subzero::cpu::SUBZERO_ISA {

Status fold_(const Fold& args, const Launch& launch) {
  Update update{args.item, args.decay, false, {}};
  update.stochastic = args.rounding == Rounding::stochastic && args.item.w.dtype != Dtype::float32;
  if (update.stochastic)
    update.rounding = noise_source(args.rng, rounding_stream(args.item.stream));
  return update_many(&update, 1, launch.threads,
                     [&](int64_t, int64_t first, int64_t count, auto&& put) {
                       for (int64_t e = first; e < first + count; ++e) put(e, args.core[e]);
                     });
}

}  // namespace subzero::cpu::SUBZERO_ISA
