#include "noise.h"
#include "ops.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

// W += sum_k coeff[k] z_(draw + k) for the `count` <= kBatch elements from `first`, which starts a
// block of the generator.
template <class T>
static void perturb_batch(const Dense& item, const Queries& queries, bool stochastic, int64_t first,
                          int64_t count) {
  float sum[kBatch] = {}, z[kBatch];
  const uint64_t block = static_cast<uint64_t>(first) / 4;
  for (int64_t k = 0; k < queries.count; ++k) {
    const float coeff = queries.coeff[k];
    if (coeff == 0.0f) continue;
    batch_normals(noise_source(queries.rng, item.stream, k), block, z, count);
    for (int64_t i = 0; i < count; ++i) sum[i] = fma_(coeff, z[i], sum[i]);
  }
  uint32_t words[kBatch];
  if (stochastic)
    batch_words(noise_source(queries.rng, rounding_stream(item.stream)), block, words, count);
  for_each_run<T>(item.w, first, count, [&](T* w, int64_t element, int64_t run) {
    const int64_t skip = element - first;
    float value[kBatch];
    load_row(w, value, run);
    for (int64_t i = 0; i < run; ++i) value[i] += sum[skip + i];
    if (stochastic)
      store_row(value, words + skip, w, run);
    else
      store_row(value, w, run);
  });
}

Status perturb_dense_(const PerturbDense& args, const Launch& launch) {
  constexpr int64_t kPart = 32 * kBatch;
  Schedule parts;
  if (!parts.allocate(args.count)) return failure("no memory for the schedule");
  for (int64_t i = 0; i < args.count; ++i)
    parts.add(ceil_div(args.items[i].w.rows * args.items[i].w.columns, kPart));
  run_parallel(parts, launch.threads, [&](int, int64_t index, int64_t part) {
    const Dense& item = args.items[index];
    const bool stochastic = args.rounding == Rounding::stochastic && item.w.dtype != Dtype::float32;
    const int64_t end = least(item.w.rows * item.w.columns, (part + 1) * kPart);
    with_dtype(item.w.dtype, [&](auto dtype) {
      for (int64_t first = part * kPart; first < end; first += kBatch)
        perturb_batch<typename decltype(dtype)::type>(item, args.queries, stochastic, first,
                                                      least(kBatch, end - first));
    });
  });
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
