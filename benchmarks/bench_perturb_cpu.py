"""perturb_many_ over every matrix of SmolLM2-135M on the CPU, against what torch offers.

    python benchmarks/bench_perturb_cpu.py [--rank 32] [--dtype float32] [--threads 2]

Timed, each as one pass over all 211 matrices, in turn, so that a busy machine slows all alike:
    perturb_many_   plan.perturb_(coeff, rng): noise regenerated, W written once
    addmm_          W.addmm_(U Z, V^T), the in-place GEMM, with Z already there
    eager           W += U Z V^T, which makes a matrix of W's size
    add_            W += 1: reads and writes W and does nothing else, the ceiling

Correctness comes first: the added term against float64. The table shows medians of wall time and
of CPU time (all threads), which other work on the machine touches less; with one thread the two
are the same on a quiet machine. The CSV, one row for each repeat and contestant, goes to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import subzero_kernels as sk
from subzero_kernels.rng import normals

LAYERS = 30
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES = [(49152, 576), *(LAYERS * LAYER)]
EPS = 1e-3


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        return f"{fields['model name']} family {fields['cpu family']} model {fields['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Model:
    """The matrices, their bases, and the contestants as calls without arguments."""

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        self.rank = rank
        self.ws = [torch.randn(shape).to(dtype) for shape in SHAPES]
        self.us = [self.basis(rows, dtype) for rows, _ in SHAPES]
        self.vs = [self.basis(columns, dtype) for _, columns in SHAPES]
        self.streams = [sk.stream_id(sk.PURPOSE_CORE, i) for i in range(len(SHAPES))]
        self.rng, self.coeff = sk.make_rng(1), torch.tensor([EPS])
        self.plan = sk.perturb_plan(self.ws, self.us, self.vs, self.streams)
        self.cores = [self.core(i).to(dtype) for i in range(len(SHAPES))]

    def basis(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, self.rank))[0].contiguous().to(dtype)

    def core(self, i: int) -> Tensor:
        """mu Z of matrix i, float64."""
        rows, columns = SHAPES[i]
        z = normals(self.rng, self.streams[i], self.rank**2).view(self.rank, self.rank).double()
        return torch.tensor(math.sqrt(rows * columns) / self.rank).double() * z

    def perturb_many_(self) -> None:
        self.plan.perturb_(self.coeff, self.rng)

    def addmm_(self) -> None:
        for w, u, v, z in zip(self.ws, self.us, self.vs, self.cores, strict=True):
            w.addmm_(u @ z, v.T, alpha=EPS)

    def eager(self) -> None:
        for w, u, v, z in zip(self.ws, self.us, self.vs, self.cores, strict=True):
            w += EPS * (u @ z @ v.T)

    def add_(self) -> None:
        for w in self.ws:
            w.add_(1.0)

    def check(self) -> float:
        """The largest error of an added term, relative in norm, beyond the store's rounding."""
        worst = 0.0
        picked = range(8)  # the embedding and one layer
        before = [self.ws[i].clone() for i in picked]
        for i in picked:
            self.ws[i].zero_()
        self.perturb_many_()
        for i in picked:
            exact = EPS * self.us[i].double() @ self.core(i) @ self.vs[i].double().T
            worst = max(worst, ((self.ws[i].double() - exact).norm() / exact.norm()).item())
            self.ws[i].copy_(before[i])
        bound = {torch.float32: 2e-7, torch.bfloat16: 3e-3, torch.float16: 3e-4}[self.ws[0].dtype]
        if worst > bound:
            raise SystemExit(f"wrong result: relative error {worst:.1e}, bound {bound:.0e}")
        return worst


class Seconds(NamedTuple):
    wall: float
    cpu: float


def seconds(call: Callable[[], None]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = Model(args.rank, getattr(torch, args.dtype))
    choice = sk.backends.choose("perturb_many_", "cpu")
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"backend {choice.backend}: {choice.reason}; relative error {model.check():.1e}")

    calls = {call.__name__: call for call in (model.perturb_many_, model.addmm_, model.add_)}
    calls["eager"] = model.eager
    for call in calls.values():
        call()
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))

    moved = 2 * sum(w.numel() * w.element_size() for w in model.ws)
    wall = {name: statistics.median(t.wall for t in values) for name, values in times.items()}
    cpu = {name: statistics.median(t.cpu for t in values) for name, values in times.items()}
    print(f"\n{'median of':<14} {'wall ms':>8} {'GB/s of W':>10} {'x addmm_':>9}", end="")
    print(f" {'CPU ms':>8} {'x addmm_':>9}")
    for name in sorted(wall, key=wall.__getitem__):
        print(
            f"{name:<14} {wall[name] * 1e3:>8.1f} {moved / wall[name] / 1e9:>10.1f} "
            f"{wall['addmm_'] / wall[name]:>9.2f} {cpu[name] * 1e3:>8.1f} "
            f"{cpu['addmm_'] / cpu[name]:>9.2f}"
        )
    print(f"\nperturb_many_ runs at {wall['add_'] / wall['perturb_many_']:.0%} of add_")

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"perturb_cpu_{args.dtype}_r{args.rank}_t{args.threads}.csv"
    where = [processor(), args.threads, torch.__version__, commit()]
    today = datetime.date.today().isoformat()
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        measured = ["op", "model", "dtype", "rank", "repeat", "wall_ms", "cpu_ms", "gb_per_s"]
        rows.writerow([*measured, "cpu", "threads", "torch", "commit", "date"])
        for name, values in times.items():
            for i, value in enumerate(values):
                row = [name, "SmolLM2-135M", args.dtype, args.rank, i]
                row += [f"{value.wall * 1e3:.3f}", f"{value.cpu * 1e3:.3f}"]
                rows.writerow([*row, f"{moved / value.wall / 1e9:.2f}", *where, today])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
