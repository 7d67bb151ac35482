// Which instruction set the CPU ops run on.
#pragma once

namespace subzero::cpu {

// The variants of this build that this processor can run, fastest first, ended by a null pointer.
const char* const* isas();

// The variant in use: the first of isas() unless select_isa named another.
const char* isa();

// False, and nothing changed, if `name` is not in isas(). For tests and diagnosis: all variants
// give the same bits.
bool select_isa(const char* name);

}  // namespace subzero::cpu
