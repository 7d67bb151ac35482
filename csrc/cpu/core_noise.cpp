#include "noise.h"
#include "ops.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

// The groups are taken a few at a time, so that their sums fit the stack; a query without a
// coefficient in those groups is not drawn. With one group `out` may be `base`: a batch is read
// before it is written.
constexpr int64_t kGroups = 16;

static void core_batch(const CoreNoise& args, const Core& item, int64_t first, int64_t count) {
  const int64_t size = item.rank * item.rank, queries = args.queries.count;
  for (int64_t group = 0; group < args.groups; group += kGroups) {
    const int64_t groups = least(kGroups, args.groups - group);
    const float* const coeff = args.queries.coeff + group * queries;
    float sum[kGroups][kBatch], z[kBatch];
    memset(sum, 0, static_cast<size_t>(groups) * sizeof sum[0]);
    for (int64_t k = 0; k < queries; ++k) {
      bool drawn = false;
      for (int64_t g = 0; g < groups; ++g) {
        const float c = coeff[g * queries + k];
        if (c == 0.0f) continue;
        if (!drawn)
          batch_normals(noise_source(args.queries.rng, item.stream, k),
                        static_cast<uint64_t>(first) / 4, z, count);
        drawn = true;
        for (int64_t i = 0; i < count; ++i) sum[g][i] = fma_(c, z[i], sum[g][i]);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      float* const out = item.out + (group + g) * size + first;
      for (int64_t i = 0; i < count; ++i) out[i] = fma_(item.mu, sum[g][i], item.base[first + i]);
    }
  }
}

Status core_noise_(const CoreNoise& args, const Launch& launch) {
  constexpr int64_t kPart = 8 * kBatch;
  Schedule parts;
  if (!parts.allocate(args.count)) return failure("no memory for the schedule");
  int64_t work = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t size = args.items[i].rank * args.items[i].rank;
    parts.add(ceil_div(size, kPart));
    work += size * (args.queries.count + args.groups);
  }
  const int threads = static_cast<int>(most(1, least(launch.threads, work >> 15)));
  run_parallel(parts, threads, [&](int, int64_t index, int64_t part) {
    const Core& item = args.items[index];
    const int64_t end = least(item.rank * item.rank, (part + 1) * kPart);
    for (int64_t first = part * kPart; first < end; first += kBatch)
      core_batch(args, item, first, least(kBatch, end - first));
  });
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
