// What every variant of the CPU ops provides; dispatch.cpp lists the variants.
#pragma once

#include "isa.h"

namespace subzero::cpu::SUBZERO_ISA {

Status philox4x32(const Philox4x32& args, const Launch& launch);
Status normal_(const Normal& args, const Launch& launch);
Status perturb_(const Perturb& args, const Launch& launch);
Status perturb_many_(const PerturbMany& args, const Launch& launch);
Status perturb_dense_(const PerturbDense& args, const Launch& launch);
Status core_noise_(const CoreNoise& args, const Launch& launch);
Status fold_(const Fold& args, const Launch& launch);
Status add_noise_(const AddNoise& args, const Launch& launch);
Status noise_outer_(const NoiseOuter& args, const Launch& launch);
Status ln(int64_t first, int64_t count, float* out);
Status sincos_turns(int64_t first, int64_t count, float* sin, float* cos);

}  // namespace subzero::cpu::SUBZERO_ISA
