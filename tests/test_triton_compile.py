"""Every Triton kernel compiles for an H100 in the configurations that are launched, on any machine.

What a GPU would refuse or run slowly shows up here: shared memory above what a multiprocessor has,
and registers spilled to memory. Triton brings its own assembler; no GPU and no toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from subzero_kernels.backends.triton_kernels import (  # noqa: E402
    lowrank_update,
    noise,
    noise_outer,
    norm,
    plans,
    shapes,
    side_path,
    tables,
)
from subzero_kernels.backends.triton_kernels.launch import TYPES, interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET is set")

H100 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
# The shapes were chosen with 3.6 and newer; before, a few kernels spill a register or two.
MOST_STACK = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else 64
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
POINTER = {FP32: "*fp32", BF16: "*bf16", FP16: "*fp16", torch.int64: "*i64"}
VECTOR = {FP32: 4, BF16: 8, FP16: 8}


class Case(NamedTuple):
    kernel: Any
    types: dict[str, str]  # of arguments, where not what _types says
    constants: dict[str, Any]  # constexpr arguments and options of the compiler
    spills: bool = False  # registers may be spilled: not a path that has to be fast


_POINTERS = {"coeff": "*fp32", "core": "*fp32", "scratch": "*fp32", "scale": "*fp32"}
_POINTERS |= {"weight": "*fp32"} | dict.fromkeys(
    ("table", "firsts", "rng", "counter", "key", "words", "query", "index", "ids", "to"), "*i64"
)
_FLOATS = ("mu", "decay", "decay_low", "beta", "beta_low")


def _types(case: Case) -> dict[str, str]:
    """Pointers by name, fp32 numbers by name, the rest int32."""
    types = {}
    for name in case.kernel.arg_names:
        default = "fp32" if name in _FLOATS else _POINTERS.get(name, "i32")
        types[name] = "constexpr" if name in case.constants else case.types.get(name, default)
    return types


def update(dtype, rank, bases=None, *, aligned=True, exact=False, stochastic=False) -> Case:
    bases = bases or dtype
    kind = plans.Kind(dtype, bases, bases, rank, aligned, aligned, aligned, True, exact)
    constants = kind.constants(stochastic) | dict(
        FIELDS=len(plans.FIELDS), U_DTYPE=TYPES[bases], V_DTYPE=TYPES[bases], DRAW=kind.draws
    )
    return Case(lowrank_update.update_many_kernel, {}, constants, spills=not aligned)


def update_one(dtype, rank, *, stochastic, decay) -> Case:
    kind = plans.Kind(dtype, dtype, dtype, rank, True, True, True, True, False)
    constants = kind.constants(stochastic) | dict(DRAW=False, DECAY=decay)
    pointers = dict.fromkeys(("w", "u", "v"), POINTER[dtype])
    return Case(lowrank_update.update_one_kernel, pointers, constants)


def normal(dtype, *, flat=True) -> Case:
    shape = shapes.NORMAL
    constants = dict(FLAT=flat, ALIGNED=flat, VEC=VECTOR[dtype], N=shape.units)
    return Case(noise.normal_kernel, dict(out=POINTER[dtype]), constants | warps(shape))


def dense(dtype, *, stochastic=False, flat=True) -> Case:
    shape = shapes.DENSE
    constants = dict(DTYPE=TYPES[dtype], FLAT=flat, ALIGNED=flat, STOCHASTIC=stochastic)
    constants |= dict(VEC=VECTOR[dtype], N=shape.units, STEPS=shape.steps)
    return Case(noise.perturb_dense_kernel, {}, constants | warps(shape))


def core_noise(*, scratch: bool) -> Case:
    fields = len(plans.FIELDS) if scratch else 5
    constants = dict(FIELDS=fields, SCRATCH=scratch, N=shapes.CORE.units)
    return Case(noise.core_noise_kernel, {}, constants | warps(shapes.CORE))


def add_noise(dtype, *, aligned=True) -> Case:
    constants = dict(ALIGNED=aligned, VEC=VECTOR[dtype], N=shapes.ROWS.units) | warps(shapes.ROWS)
    return Case(noise.add_noise_kernel, dict(y=POINTER[dtype]), constants)


def outer(dtype, width, *, quads=True, split=False) -> Case:
    shape = shapes.outer(width)
    constants = dict(R=width, BN=shape.rows, BC=shape.columns, QUADS=quads, SPLIT=split)
    constants |= dict(BETA=True) | warps(shape)
    return Case(noise_outer.noise_outer_kernel, dict(out="*fp32", a=POINTER[dtype]), constants)


def noise_sum() -> Case:
    shape = shapes.SUM
    constants = dict(BN=shape.rows, BC=shape.columns, QUADS=True) | warps(shape)
    return Case(noise_outer.noise_sum_kernel, dict(out="*fp32"), constants)


def embedding(dtype, rank) -> Case:
    kind = plans.Kind(dtype, dtype, dtype, rank, True, True, True, True, False)
    constants = kind.constants(False) | dict(ALIGNED=True)
    pointers = dict.fromkeys(("w", "u", "v", "out"), POINTER[dtype])
    named = side_path.embedding_kernel.arg_names
    options = ("num_warps", "num_stages", "maxnreg")
    kept = {key: value for key, value in constants.items() if key in (*named, *options)}
    return Case(side_path.embedding_kernel, pointers, kept)


def grouped_norm(dtype, n, *, rows=8192, centred=True, weight=True, bias=True) -> Case:
    shape = shapes.norm(n, rows)
    constants = dict(CENTRED=centred, WEIGHT=weight, BIAS=bias, RUN=shape.rows)
    constants |= dict(BLOCK=shape.columns) | warps(shape)
    pointers = dict(x=POINTER[dtype], out=POINTER[dtype], weight="*fp32", bias="*fp32", eps="fp32")
    return Case(norm.norm_kernel, pointers, constants)


def warps(shape: Any) -> dict[str, int]:
    return dict(num_warps=shape.warps)


CASES = {
    **{f"update bf16 r{rank}": update(BF16, rank) for rank in (16, 32, 64, 128, 256)},
    **{f"update fp32 r{rank}": update(FP32, rank) for rank in (32, 64, 128, 256)},
    "update fp16 r64": update(FP16, 64),
    "update fp16 r256": update(FP16, 256),
    "update bf16 r64 fp32 bases": update(BF16, 64, FP32),
    "update bf16 r64 stochastic": update(BF16, 64, stochastic=True),
    "update fp16 r64 stochastic": update(FP16, 64, stochastic=True),
    "update bf16 r16 exact": update(BF16, 16, exact=True),
    "update fp32 r64 exact": update(FP32, 64, exact=True),
    "update bf16 r64 unaligned": update(BF16, 64, aligned=False),
    "update fp32 r256 unaligned": update(FP32, 256, aligned=False),
    "fold bf16 r64": update_one(BF16, 64, stochastic=True, decay=False),
    "fold fp32 r64": update_one(FP32, 64, stochastic=False, decay=True),
    **{f"normal {POINTER[dtype][1:]}": normal(dtype) for dtype in VECTOR},
    "normal of rows": normal(BF16, flat=False),
    **{f"dense {POINTER[dtype][1:]}": dense(dtype) for dtype in VECTOR},
    "dense bf16 stochastic": dense(BF16, stochastic=True),
    "dense fp16 stochastic rows": dense(FP16, stochastic=True, flat=False),
    "core_noise": core_noise(scratch=False),
    "core_noise scratch": core_noise(scratch=True),
    "core": Case(
        noise.core_kernel, dict(out="*fp32"), dict(N=shapes.CORE.units) | warps(shapes.CORE)
    ),
    "add_noise bf16": add_noise(BF16),
    "add_noise fp32 unaligned": add_noise(FP32, aligned=False),
    "philox4x32": Case(noise.philox4x32_kernel, {}, dict(BLOCK=256, num_warps=4)),
    "table": Case(
        tables.write_kernel, {f"n{i}": "i64" for i in range(tables.WIDTH)}, dict(num_warps=1)
    ),
    "outer bf16 r64": outer(BF16, 64),
    "outer fp32 r128 split": outer(FP32, 128, split=True),
    "outer fp16 r16 odd": outer(FP16, 16, quads=False),
    "outer parts": Case(
        noise_outer.add_parts_kernel,
        dict(out="*fp32"),
        dict(BLOCK=1024, BETA=True, num_warps=4),
    ),
    "noise sum": noise_sum(),
    "embedding bf16 r64": embedding(BF16, 64),
    "layer norm bf16": grouped_norm(BF16, 5120),
    "layer norm fp32 few rows": grouped_norm(FP32, 16384, rows=512),
    "rms norm fp16": grouped_norm(FP16, 128, centred=False, bias=False),
}


def compiled(case: Case) -> Any:
    names = case.kernel.arg_names
    types = _types(case)
    constants = {key: value for key, value in case.constants.items() if key in names}
    options = {key: value for key, value in case.constants.items() if key not in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")
    }
    source = ASTSource(case.kernel, types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=H100, options=options | dict(enable_fp_fusion=False))


def stack_bytes(kernel: Any, path: Path) -> int:
    """Of the machine code's stack frame, where spilled registers go."""
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not dump.exists():
        pytest.skip("this Triton has no cuobjdump")
    path.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([dump, "-res-usage", path], capture_output=True, text=True, check=True)
    return max(int(size) for size in re.findall(r"STACK:(\d+)", said.stdout))


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_an_h100(name, tmp_path):
    case = CASES[name]
    kernel = compiled(case)
    assert kernel.metadata.shared <= SHARED_MEMORY
    if not case.spills:
        assert stack_bytes(kernel, tmp_path / "cubin") <= MOST_STACK
    ptx = kernel.asm["ptx"]
    # The contract's arithmetic: no approximation, no flush to zero. (The square root's argument is
    # never subnormal; older Tritons flush there.)
    assert not re.search(r"\b(add|mul|fma|div)\S*\.ftz|\b(sqrt|div)\S*\.approx", ptx)


@pytest.mark.parametrize("name", ["update bf16 r64", "update bf16 r64 stochastic"])
def test_w_goes_through_registers_only(name):
    """16-byte loads and stores, and in the loop no shared memory but the copies of V: what the
    kernels' order of rows and columns is for."""
    text = compiled(CASES[name]).asm["ttgir"]
    loop = text[text.rindex("tt.reshape") :]
    assert "ttg.local_store" not in loop
    ptx = compiled(CASES[name]).asm["ptx"]
    after = ptx[ptx.rindex("wgmma.mma_async") :]
    assert "st.shared" not in after and "ld.shared" not in after and "st.global.v4" in after


def test_every_kernel_is_compiled():
    modules = (lowrank_update, noise, noise_outer, norm, side_path, tables)
    kernels = {n for m in modules for n in vars(m) if n.endswith("_kernel")}
    assert kernels == {case.kernel.fn.__name__ for case in CASES.values()}
