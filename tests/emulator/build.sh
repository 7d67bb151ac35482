#!/bin/sh
# The CUDA low-rank kernels on a CPU, from their own source: every thread of a block is a fiber, and
# mma, ldmatrix, cp.async and the barriers do what the PTX manual says (mma.cuh, emu.cpp; copies
# arrive as late as allowed). Shows wrong fragments, addresses, missing waits. Usage:
#     sh tests/emulator/build.sh DIR && PYTHONPATH=.:tests python tests/emulator/drive.py DIR
set -e
HERE=$(cd "$(dirname "$0")" && pwd)
S=$HERE/../../csrc
mkdir -p "$1"; cd "$1"; cp "$HERE"/*.h "$HERE"/*.cpp "$HERE"/*.cuh .
rm -rf csrc; mkdir -p csrc/cuda; cp $S/*.h csrc/; cp $S/cuda/lowrank_*.cuh $S/cuda/noise.cuh $S/cuda/storage.cuh $S/cuda/launch.cuh $S/cuda/lowrank_update.cu $S/cuda/lowrank_kernels.cu $S/cuda/perturb.cu $S/cuda/fold.cu csrc/cuda/
cp mma.cuh csrc/cuda/mma.cuh
cd csrc/cuda
sed -i 's/#include <cuda_runtime.h>/#include "emu.h"/' launch.cuh
python3 - <<'P'
import re
p='storage.cuh'; s=open(p).read()
a=s.index("template <LoadHint kHint>"); b=s.index("// ---- pairs")
s=s[:a]+'''template <StoreHint kHint> inline void store16(void* t, const Bytes16& x) { if ((uintptr_t)t % 16) abort(); memcpy(t, &x, 16); }
'''+s[b:]
open(p,'w').write(s)
p='lowrank_kernel.cuh'; s=open(p).read()
s=s.replace('extern __shared__ __align__(16) unsigned char shared[];','unsigned char* const shared = emu::memory;')
open(p,'w').write(s)
p='lowrank_left.cuh'; s=open(p).read()
s=s.replace('__shared__ __align__(16) uint16_t shared[T::kC * T::kCoreRows * T::kCorePitch];','uint16_t* const shared = reinterpret_cast<uint16_t*>(emu::memory); emu::shared_limit = 2 * T::kC * T::kCoreRows * T::kCorePitch;')
s=s.replace("const __grid_constant__ Batch batch","const Batch& batch").replace("const __grid_constant__ UpdateCall call","const UpdateCall& call")
open(p,'w').write(s)
p='lowrank_update.cu'; s=open(p).read()
a=s.index("  cudaLaunchAttribute overlap{};"); z=s.index("}\n\nStatus UpdatePlan::run(")
s=s[:a]+"  (void)place; return emu_launch(kernel, blocks, threads, shared_bytes, arguments);\n"+s[z:]
open(p,'w').write(s)
p='lowrank_kernel.cuh'; s=open(p).read()
s=s.replace("const __grid_constant__ Batch batch","const Batch& batch").replace("const __grid_constant__ UpdateCall call","const UpdateCall& call")
open(p,'w').write(s)
p='noise.cuh'; s=open(p).read()
a=s.index('  asm("{.reg .u64 p'); b=s.index('}',s.index(': "r"(a), "r"(b));'))
s=s[:a]+'  const uint64_t p = (uint64_t)a * b; low = (uint32_t)p; high = p >> 32;\n'+s[b:]
open(p,'w').write(s)
p='perturb.cu'; s=open(p).read()
s=s.replace("const __grid_constant__ Batch batch","const Batch& batch").replace("const __grid_constant__ UpdateCall call, float* cores","const UpdateCall& call, float* const& cores")
open(p,'w').write(s)
P
cd ../..
CXX="g++ -std=c++17 -O1 -g -fPIC -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unknown-pragmas -Wno-unused-variable -Wno-unused-function -I.. -I. -I"$PWD" -x c++"
pids=""
i=0
for w in bf16 f16 float; do for r in 16 32 64 128 256; do
  $CXX -DSUBZERO_WEIGHT=$w -DSUBZERO_RANK=$r $EXTRA -c csrc/cuda/lowrank_kernels.cu -o k_${w}_$r.o & 
  i=$((i+1)); if [ $((i%3)) = 0 ]; then wait; fi
done; done; wait
for f in lowrank_update perturb fold; do $CXX -c csrc/cuda/$f.cu -o $f.o; done
$CXX -c emu.cpp -o emu.o; $CXX -c api.cpp -o api.o
g++ -shared -o libemu.so *.o
