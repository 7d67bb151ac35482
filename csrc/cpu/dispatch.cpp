#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define SUBZERO_ISA portable
#include "ops.h"
#undef SUBZERO_ISA

// The declarations of the other variants, from the same header.
#define SUBZERO_DECLARE(isa)                         \
  namespace isa {                                    \
  decltype(portable::philox4x32) philox4x32;         \
  decltype(portable::normal_) normal_;               \
  decltype(portable::perturb_) perturb_;             \
  decltype(portable::perturb_many_) perturb_many_;   \
  decltype(portable::perturb_dense_) perturb_dense_; \
  decltype(portable::core_noise_) core_noise_;       \
  decltype(portable::fold_) fold_;                   \
  decltype(portable::add_noise_) add_noise_;         \
  decltype(portable::noise_outer_) noise_outer_;     \
  decltype(portable::ln) ln;                         \
  decltype(portable::sincos_turns) sincos_turns;     \
  }

namespace subzero::cpu {

#if defined(SUBZERO_AVX512)
SUBZERO_DECLARE(avx512)
#endif
#if defined(SUBZERO_AVX2)
SUBZERO_DECLARE(avx2)
#endif

namespace {

struct Variant {
  const char* name;
  bool (*runs_here)();
  decltype(&portable::philox4x32) philox4x32;
  decltype(&portable::normal_) normal_;
  decltype(&portable::perturb_) perturb_;
  decltype(&portable::perturb_many_) perturb_many_;
  decltype(&portable::perturb_dense_) perturb_dense_;
  decltype(&portable::core_noise_) core_noise_;
  decltype(&portable::fold_) fold_;
  decltype(&portable::add_noise_) add_noise_;
  decltype(&portable::noise_outer_) noise_outer_;
  decltype(&portable::ln) ln;
  decltype(&portable::sincos_turns) sincos_turns;
};

#define SUBZERO_VARIANT(isa, runs_here) \
  {#isa,                                \
   runs_here,                           \
   isa::philox4x32,                     \
   isa::normal_,                        \
   isa::perturb_,                       \
   isa::perturb_many_,                  \
   isa::perturb_dense_,                 \
   isa::core_noise_,                    \
   isa::fold_,                          \
   isa::add_noise_,                     \
   isa::noise_outer_,                   \
   isa::ln,                             \
   isa::sincos_turns}

#if defined(SUBZERO_AVX2) || defined(SUBZERO_AVX512)
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif
#if defined(SUBZERO_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Variant kVariants[] = {
#if defined(SUBZERO_AVX512)
    SUBZERO_VARIANT(avx512, has_avx512),
#endif
#if defined(SUBZERO_AVX2)
    SUBZERO_VARIANT(avx2, has_avx2),
#endif
    SUBZERO_VARIANT(portable, [] { return true; }),
};
constexpr int kCount = sizeof kVariants / sizeof kVariants[0];

struct Here {
  const Variant* variants[kCount] = {};
  const char* names[kCount + 1] = {};
  Here() {
    int found = 0;
    for (const Variant& variant : kVariants)
      if (variant.runs_here()) {
        variants[found] = &variant;
        names[found++] = variant.name;
      }
  }
};

const Here& here() {
  static const Here found;
  return found;
}

std::atomic<const Variant*> selected{nullptr};

const Variant& variant() {
  const Variant* chosen = selected.load(std::memory_order_relaxed);
  return chosen ? *chosen : *here().variants[0];
}

}  // namespace

const char* const* isas() {
  return here().names;
}

const char* isa() {
  return variant().name;
}

bool select_isa(const char* name) {
  for (const Variant* candidate : here().variants)
    if (candidate && std::strcmp(candidate->name, name) == 0) {
      selected = candidate;
      return true;
    }
  return false;
}

Status philox4x32(const Philox4x32& args, const Launch& launch) {
  return variant().philox4x32(args, launch);
}
Status normal_(const Normal& args, const Launch& launch) {
  return variant().normal_(args, launch);
}
Status perturb_(const Perturb& args, const Launch& launch) {
  return variant().perturb_(args, launch);
}
Status perturb_many_(const PerturbMany& args, const Launch& launch) {
  return variant().perturb_many_(args, launch);
}
Status perturb_dense_(const PerturbDense& args, const Launch& launch) {
  return variant().perturb_dense_(args, launch);
}
Status core_noise_(const CoreNoise& args, const Launch& launch) {
  return variant().core_noise_(args, launch);
}
Status fold_(const Fold& args, const Launch& launch) {
  return variant().fold_(args, launch);
}
Status add_noise_(const AddNoise& args, const Launch& launch) {
  return variant().add_noise_(args, launch);
}
Status noise_outer_(const NoiseOuter& args, const Launch& launch) {
  return variant().noise_outer_(args, launch);
}
Status ln(int64_t first, int64_t count, float* out) {
  return variant().ln(first, count, out);
}
Status sincos_turns(int64_t first, int64_t count, float* sin, float* cos) {
  return variant().sincos_turns(first, count, sin, cos);
}

}  // namespace subzero::cpu
