#include "lowrank_update.h"
#include "noise.h"
#include "ops.h"

namespace subzero::cpu::SUBZERO_ISA {

struct Context {
  const Update* updates;
  Queries queries;
};

// C = mu sum_k coeff[k] Z_(draw + k), accumulated in double and rounded once.
static void noise_core(const void* opaque, int64_t item, int64_t first, int64_t count,
                       float* values) {
  const auto& [updates, queries] = *static_cast<const Context*>(opaque);
  const Update& update = updates[item];
  const double rows = static_cast<double>(update.rows());
  const double columns = static_cast<double>(update.columns());
  const double rank = static_cast<double>(update.rank());
  const float mu = static_cast<float>(__builtin_sqrt(rows * columns) / rank);
  for (int64_t start = 0; start < count; start += kBatch) {
    const int64_t made = least(kBatch, count - start);
    double sum[kBatch] = {};
    float z[kBatch];
    for (int64_t k = 0; k < queries.count; ++k) {
      const double coeff = queries.coeff[k];
      if (coeff == 0.0) continue;
      batch_normals(noise_source(queries.rng, update.item.stream, k),
                    static_cast<uint64_t>(first + start) / 4, z, made);
      for (int64_t i = 0; i < made; ++i) sum[i] += coeff * static_cast<double>(z[i]);
    }
    for (int64_t i = 0; i < made; ++i)
      values[start + i] = static_cast<float>(static_cast<double>(mu) * sum[i]);
  }
}

Status perturb_many_(const PerturbMany& args, const Launch& launch) {
  Buffer<Update> updates;
  if (!updates.allocate(args.count)) return failure("no memory for the list of matrices");
  for (int64_t i = 0; i < args.count; ++i) {
    const LowRank& item = args.items[i];
    updates.data[i] = {item, 1.0,
                       args.rounding == Rounding::stochastic && item.w.dtype != Dtype::float32,
                       noise_source(args.queries.rng, rounding_stream(item.stream))};
  }
  const Context context{updates.data, args.queries};
  return update_many(updates.data, args.count, launch.threads, noise_core, &context);
}

Status perturb_(const Perturb& args, const Launch& launch) {
  return perturb_many_({&args.item, 1, args.queries, args.rounding}, launch);
}

}  // namespace subzero::cpu::SUBZERO_ISA
