"""What bench_rng.py times: each op's arguments, the lines of torch that do as much, the check."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_bench import Call
from torch import Tensor

import subzero_kernels as sk
from subzero_kernels import backends
from subzero_kernels.rng import normals, row_normals

EPS = 1e-3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of the norm of what is added, what an op may be off beyond the rounding of its store.
BOUND = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 1e-5}
STREAM = sk.stream_id(sk.PURPOSE_ACTIVATION, 3)


class Case(NamedTuple):
    """An op on tensors of a dtype. ``what`` is a model's name or says how many rows are noisy."""

    op: str
    what: str
    dtype: str
    rows: int = 16_384
    columns: int = 5120
    queries: int = 4
    width: int = 64
    shapes: tuple[tuple[int, ...], ...] = ()  # of a model's tensors

    def __str__(self) -> str:
        return f"{self.op:<15}{self.what:<15} {self.dtype:<5}"


def allowed(got: Tensor, exact: Tensor, added: Tensor) -> float:
    """The error of ``got`` over what the contract allows."""
    store = (exact.to(got.dtype).double() - exact).norm()
    error = (got.double() - exact).norm()
    limit = 1.1 * store + BOUND[got.dtype] * added.norm()
    return (error / limit).item() if limit else float(error > 0)


class Work:
    """One case: ``ours`` runs the op on the backend that SUBZERO_BACKEND names."""

    normals = 0  # made by a call
    bytes = 0  # read and written by a call, of the tensors as large as the noise

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        self.rng = sk.make_rng(1, 2, device)

    @property
    def kind(self) -> str:
        """Under which the backends are compared."""
        raise NotImplementedError

    def ours(self) -> None:
        raise NotImplementedError

    def baselines(self, compiled: bool) -> dict[str, Call]:
        raise NotImplementedError

    def worst_error(self) -> float:
        """Run the op; the largest error over what the contract allows."""
        raise NotImplementedError


class Normal(Work):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.normals = case.rows * case.columns * case.queries
        self.out = torch.empty(self.normals, dtype=self.dtype, device=device)
        self.bytes = self.out.nbytes

    @property
    def kind(self) -> str:
        return backends.kind_of(self.dtype, self.out.numel())

    def ours(self) -> None:
        sk.normal_(self.out, self.rng, STREAM)

    def baselines(self, compiled: bool) -> dict[str, Call]:
        return {"eager": self.out.normal_, "add_": lambda: self.out.add_(1.0)}

    def worst_error(self) -> float:
        self.out.fill_(math.nan)
        self.ours()
        columns = self.case.columns
        view = self.out[: self.normals // columns * columns].view(-1, columns)
        rows = torch.tensor([0, 1, len(view) // 2, len(view) - 1], device=self.device)
        z = row_normals(self.rng, STREAM, rows, columns).double()
        return allowed(view[rows], z, z)


def eager_line(w: Tensor) -> None:
    w.add_(torch.randn_like(w), alpha=EPS)


@functools.cache
def compiled_line() -> Callable[[Tensor], None]:
    return torch.compile(eager_line, dynamic=True)


class PerturbDense(Work):
    """All tensors of a model, in one buffer."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        shapes = case.shapes
        sizes = [math.prod(shape) for shape in shapes]
        self.buffer = torch.empty(sum(sizes), dtype=self.dtype, device=device)
        parts = self.buffer.split(sizes)
        self.ws = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.streams = [sk.stream_id(sk.PURPOSE_DENSE, i) for i in range(len(sizes))]
        self.coeff = torch.full((1,), EPS, device=device)
        self.normals, self.bytes = sum(sizes), 2 * self.buffer.nbytes

    @property
    def kind(self) -> str:
        return backends.kind_of(self.dtype, self.ws[0].numel())

    def ours(self) -> None:
        sk.perturb_dense_(self.ws, self.coeff, self.rng, streams=self.streams)

    def baselines(self, compiled: bool) -> dict[str, Call]:
        def all_by(line: Callable[[Tensor], None]) -> Call:
            return lambda: [line(w) for w in self.ws]

        lines = {"eager": all_by(eager_line), "add_": lambda: self.buffer.add_(1.0)}
        return lines | ({"compiled": all_by(compiled_line())} if compiled else {})

    def worst_error(self) -> float:
        self.buffer.normal_(0, 0.02)
        picked, worst = sorted({0, 1, len(self.ws) // 2, len(self.ws) - 1}), 0.0
        views = [self.ws[i].view(-1, self.ws[i].shape[-1]) for i in picked]
        some = [torch.tensor([0, len(v) // 2, len(v) - 1], device=self.device) for v in views]
        before = [view[rows].double() for view, rows in zip(views, some, strict=True)]
        self.ours()
        for i, view, rows, old in zip(picked, views, some, before, strict=True):
            z = row_normals(self.rng, self.streams[i], rows, view.shape[1]).double()
            added = self.coeff.double() * z
            worst = max(worst, allowed(view[rows], old + added, added))
        return worst


class AddNoise(Work):
    """``what``: "all rows", "every 32nd", or "those alone", the same noisy rows and no others."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        alone = case.what == "those alone"
        count = -(-case.rows // 32) if alone else case.rows
        self.rows = torch.arange(count, device=device) * (32 if alone else 1)
        self.y = torch.randn(1, count, case.columns, device=device).to(self.dtype)
        self.scale = torch.full((1, count), 0.01, device=device)
        self.noisy = torch.arange(count, device=device)
        if case.what == "every 32nd":
            self.noisy = self.noisy[::32]
            self.scale.zero_()[0, self.noisy] = 0.01
        self.query = torch.zeros(1, dtype=torch.int64, device=device)
        self.normals = len(self.noisy) * case.columns
        self.bytes = 2 * self.normals * self.dtype.itemsize

    @property
    def kind(self) -> str:
        return backends.kind_of(self.dtype, self.y.numel())

    def ours(self) -> None:
        sk.add_noise_(self.y, self.scale, self.query, self.rows, self.rng, stream=STREAM)

    def _some(self) -> None:
        rows = self.y[0, self.noisy]
        rows += self.scale[0, self.noisy, None] * torch.randn_like(rows)
        self.y[0, self.noisy] = rows

    def _all(self) -> None:
        self.y.add_(self.scale[..., None] * torch.randn_like(self.y))

    def baselines(self, compiled: bool) -> dict[str, Call]:
        if self.case.what == "every 32nd":
            return {"eager": self._some}
        lines: dict[str, Call] = {"eager": self._all, "add_": lambda: self.y.add_(1.0)}
        return lines | ({"compiled": torch.compile(self._all)} if compiled else {})

    def worst_error(self) -> float:
        before = self.y[0].clone()
        self.ours()
        some = self.noisy[:: max(1, len(self.noisy) // 8)]
        z = row_normals(self.rng, STREAM, self.rows[some], self.case.columns).double()
        added = self.scale[0, some, None].double() * z
        error = allowed(self.y[0, some], before[some].double() + added, added)
        still = self.scale[0] == 0
        return error if torch.equal(self.y[0, still], before[still]) else math.inf


class NoiseOuter(Work):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.weight = torch.randn(case.queries, case.rows, device=device)
        self.a = torch.randn(case.rows, case.width, device=device).to(self.dtype)
        self.rows = torch.arange(case.rows, device=device)
        self.out = torch.empty(case.columns, case.width, device=device)
        self.normals = case.queries * case.rows * case.columns

    @property
    def kind(self) -> str:
        return backends.kind_of(self.dtype, self.case.rows * self.case.columns, self.case.width)

    def ours(self) -> None:
        sk.noise_outer_(self.out, self.weight, self.a, self.rows, self.rng, stream=STREAM)

    def _eager(self) -> None:
        wide = self.a.float()
        for k, weight in enumerate(self.weight):
            z = torch.randn(self.case.rows, self.case.columns, device=self.device)
            self.out.addmm_(z.mul_(weight[:, None]).T, wide, beta=float(k > 0))

    def baselines(self, compiled: bool) -> dict[str, Call]:
        # As many normals, which is what the target is a multiple of.
        plain = torch.empty(self.normals, device=self.device)
        return {"eager": self._eager, "normal_": lambda: sk.normal_(plain, self.rng, STREAM)}

    def worst_error(self) -> float:
        self.out.fill_(math.nan)
        self.ours()
        return allowed(self.out, self._exact, self._exact)

    @functools.cached_property
    def _exact(self) -> Tensor:
        exact = torch.zeros_like(self.out, dtype=torch.float64)
        for first in range(0, self.case.rows, 2048):
            part = slice(first, first + 2048)
            for k, weight in enumerate(self.weight):
                z = row_normals(self.rng, STREAM, self.rows[part], self.case.columns, draw_offset=k)
                exact += (weight[part, None] * z).double().T @ self.a[part].double()
        return exact


class CoreNoise(Work):
    """The cores of a model's matrices: the evaluations at both signs, or one update."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        count, groups = 242, 1 if case.what == "update" else 2
        self.bases = [torch.randn(case.width, case.width, device=device) for _ in range(count)]
        self.outs = [
            base[None] if groups == 1 else base.new_empty(groups, *base.shape)
            for base in self.bases
        ]
        self.coeff = torch.tensor([[EPS], [-EPS]], device=device)[:groups]
        self.streams = [sk.stream_id(sk.PURPOSE_CORE, i) for i in range(count)]
        self.normals = count * case.width**2
        self.bytes = (groups + 1) * self.normals * 4

    @property
    def kind(self) -> str:
        return backends.kind_of(torch.float32, self.bases[0].numel())

    def ours(self) -> None:
        mu = [1.0] * len(self.bases)
        sk.core_noise_(self.outs, self.bases, self.coeff, self.rng, streams=self.streams, mu=mu)

    def baselines(self, compiled: bool) -> dict[str, Call]:
        coeff = self.coeff[:, 0].tolist()

        def eager() -> None:
            for out, base in zip(self.outs, self.bases, strict=True):
                z = torch.randn_like(base)
                for target, c in zip(out, coeff, strict=True):
                    torch.add(base, z, alpha=c, out=target)

        return {"eager": eager}

    def worst_error(self) -> float:
        worst, picked = 0.0, (0, len(self.bases) - 1)
        before = [self.bases[i].double() for i in picked]
        self.ours()
        for i, base in zip(picked, before, strict=True):
            z = normals(self.rng, self.streams[i], base.numel()).view(base.shape).double()
            added = self.coeff[:, :, None].double() * z
            worst = max(worst, allowed(self.outs[i], base + added, added))
        return worst


WORK: dict[str, type[Work]] = {
    "normal_": Normal,
    "perturb_dense_": PerturbDense,
    "add_noise_": AddNoise,
    "noise_outer_": NoiseOuter,
    "core_noise_": CoreNoise,
}
