#include "noise.h"
#include "ops.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

// Row i of group g; without a scale it is not even read.
template <class T>
static void add_row(const AddNoise& args, int64_t g, int64_t i) {
  const float scale = args.scale[g * args.y.rows + i];
  if (scale == 0.0f) return;
  T* const y = static_cast<T*>(args.y.data) + g * args.y.group_stride + i * args.y.row_stride;
  const int64_t columns = args.y.columns;
  const NoiseSource source = noise_source(args.rng, args.stream, args.query[g]);
  for_each_batch(source, args.row[i] * columns, columns,
                 [&](int64_t at, const float* z, int64_t count) {
                   float value[kBatch];
                   load_row(y + at, value, count);
                   for (int64_t j = 0; j < count; ++j) value[j] = fma_(scale, z[j], value[j]);
                   store_row(value, y + at, count);
                 });
}

Status add_noise_(const AddNoise& args, const Launch& launch) {
  constexpr int64_t kPart = 32 * kBatch;
  const int64_t rows = args.y.rows, step = most(1, kPart / args.y.columns);
  Schedule parts;
  if (!parts.allocate(args.y.groups)) return failure("no memory for the schedule");
  for (int64_t g = 0; g < args.y.groups; ++g) parts.add(ceil_div(rows, step));
  run_parallel(parts, launch.threads, [&](int, int64_t g, int64_t part) {
    with_dtype(args.y.dtype, [&](auto dtype) {
      const int64_t end = least(rows, (part + 1) * step);
      for (int64_t i = part * step; i < end; ++i)
        add_row<typename decltype(dtype)::type>(args, g, i);
    });
  });
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
