#include "ops.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

Status philox4x32(const Philox4x32& args, const Launch& launch) {
  constexpr int64_t kPart = 8192;
  const uint32_t key0 = static_cast<uint32_t>(args.key[0]);
  const uint32_t key1 = static_cast<uint32_t>(args.key[1]);
  Schedule parts;
  if (!parts.allocate(1)) return failure("no memory for the schedule");
  parts.add(ceil_div(args.count, kPart));
  run_parallel(parts, launch.threads, [&](int, int64_t, int64_t part) {
    const int64_t end = least(args.count, (part + 1) * kPart);
    for (int64_t i = part * kPart; i < end; ++i) {
      const int64_t* const c = args.counter + 4 * i;
      const Words words =
          philox4x32_10({{static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]),
                          static_cast<uint32_t>(c[2]), static_cast<uint32_t>(c[3])}},
                        key0, key1);
      for (int j = 0; j < 4; ++j) args.words[4 * i + j] = words.w[j];
    }
  });
  return Status{};
}

Status ln(int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = 0.5f * twice_ln(uniform_open(static_cast<uint32_t>(first + i) << 8));
  return Status{};
}

Status sincos_turns(int64_t first, int64_t count, float* sin, float* cos) {
  for (int64_t i = 0; i < count; ++i) {
    const Pair both = on_circle(1.0f, static_cast<uint32_t>(first + i) << 8);
    sin[i] = both.odd, cos[i] = both.even;
  }
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
