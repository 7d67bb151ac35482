"""Every in-place op as a call on what it writes, for tests that hold for all of them on a GPU.

``python tests/gpu_cases.py DEVICE`` prints the digests of what all of them write on the backend
that SUBZERO_BACKEND names, over and over until a line comes from the standard input.
"""

from __future__ import annotations

import hashlib
import math
import select
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import subzero_kernels as sk

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QUERIES = 2  # draws that a call reads
SEED, DRAW = 2**40 + 3, 2**32 - 3  # draws wrap


class InPlace(NamedTuple):
    """What an op starts from and writes, a call of it, and the bytes of its U."""

    start: list[Tensor]
    run: Callable[[list[Tensor], Tensor], None]  # (what to write, rng)
    basis_bytes: int

    def fresh(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.start]

    def result(self, draw: int = DRAW) -> list[Tensor]:
        """What it writes, in new memory."""
        written = self.fresh()
        self.run(written, self.rng(draw))
        return written

    def rng(self, draw: int = DRAW) -> Tensor:
        return sk.make_rng(SEED, draw % 2**32, self.start[0].device)


class Data:
    """Arguments of ops, the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype, rows: int, columns: int, rank: int):
        self.device, self.dtype = device, dtype
        self.rows, self.columns, self.rank = rows, columns, rank
        self.coeff = torch.tensor([1e-2, -3e-3], device=device)
        self._generator = torch.Generator().manual_seed(11)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._generator)
        return values.to(dtype or self.dtype).to(self.device)

    def matrix(self, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """W, U and V; the columns of U and V are nearly orthonormal."""
        u, v = (
            (self.normal(size, rank, dtype=torch.float32) / math.sqrt(size)).to(self.dtype)
            for size in (rows, columns)
        )
        return self.normal(rows, columns), u, v


def normal_(data: Data) -> InPlace:
    start = [data.normal(data.rows, data.columns)]
    return InPlace(start, lambda out, rng: sk.normal_(out[0], rng, 9), 0)


def perturb_(data: Data) -> InPlace:
    w, u, v = data.matrix(data.rows, data.columns, data.rank)

    def run(written: list[Tensor], rng: Tensor) -> None:
        sk.perturb_(written[0], u, v, data.coeff, rng, stream=3, rounding="stochastic")

    return InPlace([w], run, u.nbytes)


def perturb_many_(data: Data) -> InPlace:
    shapes = [(data.rows, data.columns), (data.columns, 77), (1, data.rows), (data.rows, 5)]
    ranks = [min(data.rank, *shape) for shape in shapes]
    parts = [data.matrix(*shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
    ws, us, vs = (list(part) for part in zip(*parts, strict=True))
    streams = [3, 4, 5, 6]

    def run(written: list[Tensor], rng: Tensor) -> None:
        sk.perturb_many_(written, us, vs, data.coeff, rng, streams=streams)

    return InPlace(ws, run, sum(u.nbytes for u in us))


def perturb_dense_(data: Data) -> InPlace:
    ws = [data.normal(data.rows, data.columns), data.normal(data.columns), data.normal(3)]

    def run(written: list[Tensor], rng: Tensor) -> None:
        streams = [1 << 28 | i for i in range(3)]
        sk.perturb_dense_(written, data.coeff, rng, streams=streams, rounding="stochastic")

    return InPlace(ws, run, 0)


def core_noise_(data: Data) -> InPlace:
    bases = [data.normal(r, r, dtype=torch.float32) for r in (data.rank, 1, 7)]

    def run(written: list[Tensor], rng: Tensor) -> None:
        outs = [base[None] for base in written]
        mu = [0.5, 2.0, 3.0]
        sk.core_noise_(outs, written, data.coeff[None], rng, streams=[3, 4, 5], mu=mu)

    return InPlace(bases, run, 0)


def fold_(data: Data) -> InPlace:
    w, u, v = data.matrix(data.rows, data.columns, data.rank)
    core = data.normal(data.rank, data.rank, dtype=torch.float32)

    def run(written: list[Tensor], rng: Tensor) -> None:
        sk.fold_(written[0], u, v, core, decay=0.99, rounding="stochastic", rng=rng, stream=3)

    return InPlace([w], run, u.nbytes)


def add_noise_(data: Data) -> InPlace:
    y = data.normal(2, data.rows, data.columns)
    scale = data.normal(2, data.rows, dtype=torch.float32)
    scale[:, ::3] = 0.0
    query = torch.tensor([0, 1], device=data.device)
    rows = (torch.arange(data.rows, device=data.device) + 5) << 20

    def run(written: list[Tensor], rng: Tensor) -> None:
        sk.add_noise_(written[0], scale, query, rows, rng, stream=5 << 28 | 3)

    return InPlace([y], run, 0)


def noise_outer_(data: Data) -> InPlace:
    """``out`` (c, r) has the place of U: it is as narrow, and sums of parts of it are scratch."""
    out = data.normal(data.columns, data.rank, dtype=torch.float32)
    weight = data.normal(QUERIES, data.rows, dtype=torch.float32)
    a = data.normal(data.rows, data.rank)
    rows = (torch.arange(data.rows, device=data.device) + 5) << 20

    def run(written: list[Tensor], rng: Tensor) -> None:
        sk.noise_outer_(written[0], weight, a, rows, rng, stream=5 << 28 | 3, beta=0.9)

    return InPlace([out], run, out.nbytes)


OPS: dict[str, Callable[[Data], InPlace]] = {
    make.__name__: make
    for make in (
        normal_,
        perturb_,
        perturb_many_,
        perturb_dense_,
        core_noise_,
        fold_,
        add_noise_,
        noise_outer_,
    )
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x).cpu(), bits(y).cpu()) for x, y in zip(a, b, strict=True))


def digest(device: str) -> str:
    """Of what all ops write in all dtypes."""
    total = hashlib.sha256()
    for make in OPS.values():
        for dtype in DTYPES:
            for tensor in make(Data(device, dtype, 264, 520, 24)).result():
                total.update(bits(tensor).cpu().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    while True:
        print(digest(sys.argv[1]), flush=True)
        if select.select([sys.stdin], [], [], 0)[0]:
            break
