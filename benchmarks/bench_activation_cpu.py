"""add_noise_ and noise_outer_ on the CPU, against the noise alone and against eager torch.

    python benchmarks/bench_activation_cpu.py [--threads 2]

Sizes: the label rows of 32 queries of 16 examples at the width of SmolLM2-135M, and every token of
4 queries of 16 sequences of 128 tokens at width 2048. Timed in turn:
    add_noise_     the op
    noise_outer_   the op, with a of rank 64 and of the width of an MLP
    normal_        as many of the contract's normals, written and nothing else: the floor
    eager          the same with torch.randn: y += scale * randn, and the product with stored noise

Correctness comes first, against float64. The CSV, one row for each repeat and contestant, goes to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from bench_perturb_cpu import Seconds, commit, processor, seconds
from torch import Tensor

import subzero_kernels as sk
from subzero_kernels.rng import row_normals

SIZES = {"label rows": (32, 16, 576, 1536), "all tokens": (4, 2048, 2048, 8192)}
STREAM = sk.stream_id(sk.PURPOSE_ACTIVATION, 0)
SMALL_RANK = 64


class Case:
    """Inputs of one size, and the contestants as calls without arguments."""

    def __init__(self, queries: int, rows: int, width: int, wide: int) -> None:
        self.y = torch.randn(queries, rows, width)
        self.scale = torch.rand(queries, rows)
        self.query, self.rng = torch.arange(queries), sk.make_rng(1)
        self.rows = (torch.arange(rows) << 20) + 7
        self.weight = torch.randn(queries, rows)
        self.narrow, self.a = torch.randn(rows, SMALL_RANK), torch.randn(rows, wide)
        self.out, self.small = torch.zeros(width, wide), torch.zeros(width, SMALL_RANK)
        self.noise = torch.empty(queries, rows, width)

    def calls(self) -> dict[str, Callable[[], object]]:
        """By name: what is timed."""
        noise, outer = self.noise, sk.noise_outer_
        return {
            "normal_": lambda: sk.normal_(noise, self.rng, STREAM),
            "add_noise_": self.add_noise,
            "add eager": lambda: self.y.addcmul_(self.scale[..., None], torch.randn_like(self.y)),
            f"noise_outer_ r={SMALL_RANK}": lambda: outer(
                self.small, self.weight, self.narrow, self.rows, self.rng, stream=STREAM
            ),
            f"outer eager r={SMALL_RANK}": lambda: self.eager(self.narrow),
            f"noise_outer_ r={self.a.shape[1]}": lambda: outer(
                self.out, self.weight, self.a, self.rows, self.rng, stream=STREAM
            ),
            f"outer eager r={self.a.shape[1]}": lambda: self.eager(self.a),
        }

    def add_noise(self) -> None:
        sk.add_noise_(self.y, self.scale, self.query, self.rows, self.rng, stream=STREAM)

    def eager(self, a: Tensor) -> Tensor:
        """With the noise stored: weighted sum, then the product."""
        return torch.einsum("kn,knc->nc", self.weight, self.noise).T @ a

    def check(self) -> float:
        """The largest relative error in norm of either op's added term."""
        k, _, width = self.y.shape
        z = torch.stack(
            [row_normals(self.rng, STREAM, self.rows, width, draw_offset=i) for i in range(k)]
        )
        before, term = self.y.clone(), self.scale.double()[..., None] * z.double()
        self.y.zero_()
        self.add_noise()
        errors = [(self.y.double() - term).norm() / term.norm()]
        self.y.copy_(before)
        sk.noise_outer_(self.out, self.weight, self.a, self.rows, self.rng, stream=STREAM)
        exact = torch.einsum("kn,knc->nc", self.weight.double(), z.double()).T @ self.a.double()
        errors.append((self.out.double() - exact).norm() / exact.norm())
        worst = float(torch.stack(errors).max())
        if worst > 1e-6:
            raise SystemExit(f"wrong result: relative error {worst:.1e}, bound 1e-06")
        return worst


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"activation_cpu_float32_t{args.threads}.csv"
    where = [processor(), args.threads, torch.__version__, commit()]
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "size",
                "op",
                "repeat",
                "wall_ms",
                "cpu_ms",
                "cpu",
                "threads",
                "torch",
                "commit",
                "date",
            ]
        )
        for size, shape in SIZES.items():
            case = Case(*shape)
            print(f"\n{size}: K {shape[0]}, N {shape[1]}, c {shape[2]}; error {case.check():.1e}")
            times: dict[str, list[Seconds]] = {name: [] for name in case.calls()}
            for i in range(args.repeats + 1):
                for name, call in case.calls().items():
                    taken = seconds(call)  # the first round warms up
                    if i:
                        times[name].append(taken)
            floor = statistics.median(t.wall for t in times["normal_"])
            for name, values in times.items():
                wall = statistics.median(t.wall for t in values)
                print(f"{name:<22} {1e3 * wall:>9.3f} ms {wall / floor:>7.2f} x normal_")
                for i, value in enumerate(values):
                    rows.writerow(
                        [size, name, i, f"{1e3 * value.wall:.3f}", f"{1e3 * value.cpu:.3f}", *where]
                        + [datetime.date.today().isoformat()]
                    )
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
