"""lowrank_linear on the layers of whole models, against the plain product that it contains.

    python benchmarks/bench_linear.py                      # all layers and numbers of rows
    python benchmarks/bench_linear.py --model OPT-13B --rows 1024 8192
    python benchmarks/bench_linear.py --choices            # each way of cutting the CUDA kernel too

Compared, in turn, with W and x rotated past the L2 cache:
    linear       F.linear with the bias: what plain inference costs
    op           lowrank_linear by the backend that runs it
    composed     the same value by torch's GEMMs (backends/_gemms.py), what it falls back on
    0 .. 7       with --choices: tiles of 256 x 128, 256 x 160, 128 x 128, 128 x 256 with
                 h = (x V) C^T from a kernel before; the same with h made inside

Two groups, a rank and a bias as the model has them. Correctness comes first: chosen rows against
float64, within what the contract allows. A line of the table is one contestant:
    us           of the GPU alone
    TFLOP/s      of the plain product alone
    x linear     its time over that of F.linear: 1.0 is the speed of inference
    error        as a fraction of what the contract allows
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_bench import (
    RESULTS,
    Call,
    attempt,
    buffers_needed,
    interleaved_us,
    machine,
    release_memory,
    write_csv,
)
from model_shapes import MODELS, RANKS
from torch import Tensor

import subzero_kernels as sk
from subzero_kernels.backends import _gemms

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = [256, 512, 1024, 2048, 4096, 8192]
CHOICES = range(8)
GROUPS = 2
CHECKED = 64  # rows, spread over both groups


class Layer(NamedTuple):
    """What lowrank_linear takes."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    u: Tensor
    v: Tensor
    core: Tensor


class Case(NamedTuple):
    """A layer of a model on so many rows."""

    model: str
    m: int
    n: int
    rank: int
    rows: int
    dtype: str

    def make(self, device: str) -> Layer:
        options: dict[str, Any] = dict(device=device, dtype=DTYPES[self.dtype])
        bias = torch.randn(self.m, **options) if self.model.startswith("OPT") else None
        return Layer(
            torch.randn(self.rows, self.n, **options),
            torch.randn(self.m, self.n, **options) / self.n**0.5,
            bias,
            # As orthonormal bases are, in size.
            torch.randn(self.m, self.rank, **options) / self.m**0.5,
            torch.randn(self.n, self.rank, **options) / self.n**0.5,
            torch.randn(GROUPS, self.rank, self.rank, device=device),
        )


def cases(args: argparse.Namespace) -> list[Case]:
    return [
        Case(model, m, n, args.rank or RANKS[model], rows, args.dtype)
        for model in args.model
        for m, n in dict.fromkeys(s for s in MODELS[model].of_layer if len(s) == 2)
        for rows in args.rows
    ]


def contestants(case: Case, choices: bool) -> dict[str, Callable[[Layer], Tensor]]:
    found: dict[str, Callable[[Layer], Tensor]] = {
        "linear": lambda layer: F.linear(layer.x, layer.w, layer.bias),
        "op": lambda layer: sk.lowrank_linear(*layer),
        "composed": lambda layer: _gemms.lowrank_linear(*layer),
    }
    if choices and case.rows >= 256 and case.dtype != "fp32":
        for choice in CHOICES if case.rank <= 64 else CHOICES[:4]:
            found[str(choice)] = lambda layer, choice=choice: _cut(layer, choice)
    return found


def _cut(layer: Layer, choice: int) -> Tensor:
    """The CUDA kernel, cut this way."""
    from subzero_kernels.backends import _native_args as args
    from subzero_kernels.backends import cuda

    native = args.require().cuda
    x, w, bias, u, v, core = layer
    size = native.lowrank_linear_scratch_bytes(
        rows=x.shape[0], rank=u.shape[1], groups=core.shape[0]
    )
    scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    native.lowrank_linear(
        args=args.lowrank_linear(x, w, bias, u, v, core, scratch, y),
        launch=cuda._launch(w),
        choice=choice,
    )
    return y


def error_of(y: Tensor, layer: Layer) -> float:
    """Of chosen rows, over 1.1 of the store's rounding plus c of the norm of what is added."""
    rows = torch.arange(0, len(y), max(1, len(y) // CHECKED), device=y.device)
    x, w, u, v, core = (t.double() for t in (layer.x[rows], *layer[1:2], *layer[3:]))
    group = rows // (len(y) // GROUPS)
    base = x @ w.T
    tail = torch.einsum("ik,ijk->ij", x @ v, core[group]) @ u.T
    exact = base + tail
    if layer.bias is not None:
        exact += layer.bias.double()
    store = (exact.to(y.dtype).double() - exact).norm()
    c = 1e-5 if y.dtype == torch.float32 else 2e-3
    allowed = 1.1 * store + c * torch.stack((base, tail)).norm()
    return float((y[rows].double() - exact).norm() / allowed)


def measure(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    size = DTYPES[case.dtype].itemsize
    count = min(16, buffers_needed(size * (case.m * case.n + case.rows * (case.m + case.n))))
    layers = [case.make(args.device) for _ in range(count)]
    calls: dict[str, list[Call]] = {}
    errors: dict[str, float] = {}
    for name, run in contestants(case, args.choices).items():
        if name != "linear":
            error = attempt(f"{case} {name}", lambda run=run: error_of(run(layers[0]), layers[0]))
            if error is None:
                continue
            errors[name] = error
            if not error <= 1:
                print(f"{case} {name}: WRONG, {error:.2f} of what is allowed", flush=True)
                continue
        calls[name] = [lambda run=run, layer=layer: run(layer) for layer in layers]
    times = interleaved_us(calls, args.repeats, args.least_ms)
    rows = [
        {
            **case._asdict(),
            "contestant": name,
            "us": us,
            "tflops": 2 * case.m * case.n * case.rows / us / 1e6,
            "x_linear": us / times["linear"],
            "error": errors.get(name, ""),
        }
        for name, us in times.items()
    ]
    for row in rows:
        error = f"{row['error']:.2f}" if row["error"] != "" else ""
        print(
            f"{case.model:10} {case.m:>5} x {case.n:<5} r {case.rank:<3} {case.dtype} "
            f"{case.rows:>5} rows  {row['contestant']:9} {row['us']:>9.1f} us "
            f"{row['tflops']:>6.0f} TFLOP/s {row['x_linear']:>6.3f}  {error}",
            flush=True,
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--rank", type=int, help="instead of the model's")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--choices", action="store_true", help="each way to cut the CUDA kernel")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--least-ms", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "linear.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    where = machine()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in cases(args):
            rows += attempt(str(case), lambda case=case: measure(case, args)) or []
            release_memory()
    if rows:
        write_csv(args.output, rows, where)


if __name__ == "__main__":
    main()
