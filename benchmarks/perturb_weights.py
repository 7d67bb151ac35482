"""What bench_perturb.py works on: the weights of a case, the calls it times, the check of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import subzero_kernels as sk
from subzero_kernels import backends
from subzero_kernels.rng import normals, round_stochastic, rounding_stream, words

EPS = 1e-3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of the norm of what is added, what an op may be off beyond the rounding of its store.
BOUND = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 1e-5}


class Case(NamedTuple):
    """An op on a list of weights, given by their shapes and by the (m', n') they are seen as."""

    op: str
    what: str
    shapes: list[tuple[int, ...]]
    matrices: list[tuple[int, int]]
    dtype: str
    rank: int

    @property
    def bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        return f"{self.op:<14}{self.what:<12} {self.dtype:<5} r{self.rank:<4}"


def eager_line(w: Tensor, u: Tensor, z: Tensor, v: Tensor) -> None:
    w += EPS * (u @ z @ v.T)


def addmm_line(w: Tensor, u: Tensor, z: Tensor, v: Tensor) -> None:
    w.addmm_(u @ z, v.T, alpha=EPS)


@functools.cache
def line(name: str) -> Callable[..., None]:
    """One of what torch offers, for one matrix."""
    if name != "compiled":
        return {"eager": eager_line, "addmm_": addmm_line}[name]
    # Compiled for each shape, dtype and rank, of which there are more than torch expects.
    config = torch._dynamo.config
    config.cache_size_limit = config.accumulated_cache_size_limit = 4096
    return torch.compile(eager_line, dynamic=False)


class Weights:
    """All weights of a case in one buffer, nearly orthonormal bases, and the cores mu Z."""

    def __init__(self, case: Case, device: str) -> None:
        dtype = DTYPES[case.dtype]
        sizes = [math.prod(shape) for shape in case.shapes]
        self.buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
        self.renew()
        parts = self.buffer.split(sizes)
        self.ws = [part.view(shape) for part, shape in zip(parts, case.shapes, strict=True)]
        self.matrices = [part.view(shape) for part, shape in zip(parts, case.matrices, strict=True)]
        ranks = [min(case.rank, *shape) for shape in case.matrices]

        def bases(side: int) -> list[Tensor]:
            sizes = [(shape[side], rank) for shape, rank in zip(case.matrices, ranks, strict=True)]
            noise = (torch.randn(size, device=device) / math.sqrt(size[0]) for size in sizes)
            return [basis.to(dtype) for basis in noise]

        self.us, self.vs = bases(0), bases(1)
        self.streams = [sk.stream_id(sk.PURPOSE_CORE, i) for i in range(len(sizes))]
        self.rng = sk.make_rng(1, 2, device)
        self.coeff = torch.full((1,), EPS, device=device)
        self.cores = [self._core(i, ranks[i]) for i in range(len(sizes))]
        self.folded = [(EPS * core).float() for core in self.cores]
        self._zs = [core.to(dtype) for core in self.cores]  # as the baselines take them
        self._plan = sk.perturb_plan(self.ws, self.us, self.vs, self.streams)

    def _core(self, i: int, rank: int) -> Tensor:
        """mu Z of weight i in float64; mu is an fp32 number by the contract."""
        mu = torch.tensor(math.sqrt(self.ws[i].numel()) / rank).item()
        return mu * normals(self.rng, self.streams[i], rank**2).view(rank, rank).double()

    @property
    def kind(self) -> str:
        """Under which the backends are compared."""
        return backends.kind_of(self.ws[0].dtype, self.ws[0].numel(), self.us[0].shape[1])

    # ---- ours, on the backend that SUBZERO_BACKEND names

    def renew(self) -> None:
        self.buffer.normal_(0, 0.02)

    def call(self, op: str) -> Callable[[], None]:
        return getattr(self, op)

    def perturb_(self) -> None:
        arguments = self.us[0], self.vs[0], self.coeff, self.rng
        sk.perturb_(self.ws[0], *arguments, stream=self.streams[0])

    def perturb_many_(self) -> None:
        self._plan.perturb_(self.coeff, self.rng)

    def perturb_lists_(self) -> None:
        arguments = self.us, self.vs, self.coeff, self.rng
        sk.perturb_many_(self.ws, *arguments, streams=self.streams)

    def fold_(self) -> None:
        everything = zip(self.ws, self.us, self.vs, self.folded, self.streams, strict=True)
        for w, u, v, core, stream in everything:
            sk.fold_(w, u, v, core, rounding="stochastic", rng=self.rng, stream=stream)

    # ---- what they are compared with

    def line(self, name: str) -> Callable[[], None]:
        """A line of torch over all matrices."""
        one = line(name)

        def run() -> None:
            for w, u, z, v in zip(self.matrices, self.us, self._zs, self.vs, strict=True):
                one(w, u, z, v)

        return run

    def add_(self) -> None:
        self.buffer.add_(1.0)


# ---- correctness


def worst_error(weights: Weights, op: str) -> float:
    """Run the op on new weights: the largest error of a matrix over what the contract allows.

    A few rows of each matrix are looked at, the first and the last among them.
    """
    weights.renew()
    picked = [_some_rows(w) for w in weights.matrices]
    before = [w[rows].double() for w, rows in zip(weights.matrices, picked, strict=True)]
    weights.call(op)()
    pairs = enumerate(zip(picked, before, strict=True))
    return torch.stack([_error(weights, op == "fold_", i, *each) for i, each in pairs]).max().item()


def _some_rows(w: Tensor, most: int = 8) -> Tensor:
    rows = sorted({round(i * (len(w) - 1) / (most - 1)) for i in range(most)})
    return torch.tensor(rows, device=w.device)


def _error(weights: Weights, fold: bool, i: int, rows: Tensor, before: Tensor) -> Tensor:
    w = weights.matrices[i]
    core = weights.folded[i].double() if fold else EPS * weights.cores[i]
    added = weights.us[i][rows].double() @ core @ weights.vs[i].double().T
    exact, allowed = before + added, BOUND[w.dtype] * added.norm()
    if fold and w.dtype != torch.float32:
        return _error_of_stochastic(weights, i, rows, exact, allowed)
    store = (exact.to(w.dtype).double() - exact).norm()
    return (w[rows].double() - exact).norm() / (1.1 * store + allowed)


def _error_of_stochastic(
    weights: Weights, i: int, rows: Tensor, exact: Tensor, allowed: Tensor
) -> Tensor:
    """2 where an element is not what its word makes of any sum within the error, else 0."""
    w = weights.matrices[i]
    columns, stream = w.shape[1], rounding_stream(weights.streams[i])
    starts = [row * columns for row in rows.tolist()]
    word = torch.stack([words(weights.rng, stream, columns, start=start) for start in starts])
    margin = 8 * allowed / math.sqrt(exact.numel())
    low, high = (round_stochastic((exact + e).float(), word, w.dtype) for e in (-margin, margin))
    got = w[rows].float()
    return 2.0 * ((got < low.float()) | (got > high.float())).any().double()
