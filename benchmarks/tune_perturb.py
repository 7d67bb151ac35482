"""Which shape of thread block is fastest for the CUDA low-rank updates, against an in-place add.

Needs a build that holds all shapes of csrc/cuda/lowrank_kernels.cu (numbered there):

    CMAKE_ARGS=-DSUBZERO_TUNE=ON CMAKE_CUDA_ARCHITECTURES=90a-real pip install -e .
    python benchmarks/tune_perturb.py [workload ...] [--shapes 0 3 5]

Every shape must give the bits of shape 0. Times are replays of a CUDA graph, in turn with the
ceiling, an in-place add over the same tensors; the rest of the table is a fraction of it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from gpu_bench import MODELS, Shape, interleaved_us, machine, opt_13b_lora

import subzero_kernels as sk
from subzero_kernels.backends import cuda

SHAPES = 7
VARIABLE = "SUBZERO_TUNE_SHAPE"


class Workload(NamedTuple):
    shapes: Sequence[Shape]  # (m', n')
    rank: int
    dtype: torch.dtype
    together: bool = True  # one call for all, or one for each
    fold: bool = False  # fold_ with stochastic rounding


def _opt(name: str, layers: int) -> list[Shape]:
    return MODELS[name].matrices[: 2 + 6 * layers]


_square = [(5120, 5120)] * 16
_lora = [(256, 160)] * len(opt_13b_lora())
WORKLOADS = {
    "OPT-13B bf16 r64": Workload(_opt("OPT-13B", 40), 64, torch.bfloat16),
    "OPT-13B (10 layers) fp32 r64": Workload(_opt("OPT-13B", 10), 64, torch.float32),
    "OPT-1.3B bf16 r24": Workload(_opt("OPT-1.3B", 24), 24, torch.bfloat16),
    "OPT-1.3B fp32 r24": Workload(_opt("OPT-1.3B", 24), 24, torch.float32),
    "5120^2 bf16 r64": Workload(_square, 64, torch.bfloat16, together=False),
    "5120^2 fp32 r64": Workload(_square, 64, torch.float32, together=False),
    "5120^2 bf16 r128": Workload(_square, 128, torch.bfloat16, together=False),
    "5120^2 fp32 r128": Workload(_square, 128, torch.float32, together=False),
    "fold_ 13B (10 layers) bf16 r64": Workload(
        _opt("OPT-13B", 10), 64, torch.bfloat16, together=False, fold=True
    ),
    "LoRA bf16 r8": Workload(_lora, 8, torch.bfloat16),
    "LoRA fp32 r8": Workload(_lora, 8, torch.float32),
}


def calls_of(work: Workload, ws: list[torch.Tensor]) -> list[Callable[[], None]]:
    """What one round over all tensors takes, with the shape that the environment names."""
    device = ws[0].device
    bases: dict[int, torch.Tensor] = {}
    for shape in set(work.shapes):
        for rows in shape:
            noise = torch.randn(rows, work.rank, device=device)
            bases[rows] = (noise / rows**0.5).to(work.dtype)
    us, vs = ([bases[shape[i]] for shape in work.shapes] for i in (0, 1))
    coeff, rng = torch.full((1,), 1e-3, device=device), sk.make_rng(1, 0, device)
    if work.fold:
        core = 1e-3 * torch.randn(work.rank, work.rank, device=device)
        return [
            lambda w=w, u=u, v=v: cuda.fold_(w, u, v, core, rounding="stochastic", rng=rng)
            for w, u, v in zip(ws, us, vs, strict=True)
        ]
    streams = list(range(len(ws)))
    groups = [slice(None)] if work.together else [slice(i, i + 1) for i in streams]
    plans = [cuda.PerturbPlan(ws[g], us[g], vs[g], streams[g]) for g in groups]
    return [lambda plan=plan: plan.perturb_(coeff, rng) for plan in plans]


def bits(work: Workload) -> torch.Tensor:
    """A small update with the shape that the environment names."""
    torch.manual_seed(1)
    small = work._replace(shapes=[(515, 1544), (64 + work.rank, 3088)])
    ws = [torch.randn(shape, device="cuda").to(work.dtype) for shape in small.shapes]
    for call in calls_of(small, ws):
        call()
    return torch.cat([w.flatten() for w in ws])


def measure(name: str, work: Workload, shapes: Sequence[int]) -> None:
    ws = [torch.zeros(shape, dtype=work.dtype, device="cuda") for shape in work.shapes]
    os.environ[VARIABLE] = "0"
    expected = bits(work)
    nbytes = 2 * sum(w.nbytes for w in ws)
    row = []
    for number in shapes:
        os.environ[VARIABLE] = str(number)
        try:
            right = torch.equal(bits(work), expected)
        except RuntimeError as error:  # more shared memory than the GPU has
            row.append(f"{number}: {str(error).split(',')[0]}")
            continue
        if not right:
            row.append(f"{number}: WRONG")
            continue
        calls = calls_of(work, ws)

        def update(calls: list[Callable[[], None]] = calls) -> None:
            for call in calls:
                call()

        def add() -> None:
            for w in ws:
                w.add_(1.0)

        us = interleaved_us({"update": update, "add": add}, repeats=3)
        row.append(f"{number}: {us['add'] / us['update']:.3f}")
        if number == shapes[0]:
            speed = nbytes / us["add"] / 1e6
            print(f"{name}: add {speed:.2f} TB/s, shape {number} {us['update']:.1f} us", flush=True)
    print("   ", "  ".join(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", nargs="*", help="parts of names; all by default")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(SHAPES))
    args = parser.parse_args()
    print(machine())
    for name, work in WORKLOADS.items():
        if not args.workload or any(part in name for part in args.workload):
            with torch.no_grad():
                measure(name, work, list(args.shapes))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
