#include "noise.h"
#include "ops.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

Status normal_(const Normal& args, const Launch& launch) {
  constexpr int64_t kPart = 64 * kBatch;
  const int64_t elements = args.out.rows * args.out.columns;
  const NoiseSource source = noise_source(args.rng, args.stream);
  Schedule parts;
  if (!parts.allocate(1)) return failure("no memory for the schedule");
  parts.add(ceil_div(elements, kPart));
  run_parallel(parts, launch.threads, [&](int, int64_t, int64_t part) {
    const int64_t end = least(elements, (part + 1) * kPart);
    for (int64_t first = part * kPart; first < end; first += kBatch) {
      const int64_t count = least(kBatch, end - first);
      float z[kBatch];
      batch_normals(source, static_cast<uint64_t>(first) / 4, z, count);
      with_dtype(args.out.dtype, [&](auto dtype) {
        using T = typename decltype(dtype)::type;
        for_each_run<T>(args.out, first, count, [&](T* out, int64_t element, int64_t run) {
          store_row(z + (element - first), out, run);
        });
      });
    }
  });
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
