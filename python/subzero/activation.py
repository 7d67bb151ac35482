"""Noise in the activations: where it enters, what is kept of the rows it credits.

A linear y = x W^T meets, in one pass over the model, the clean group (which gives x and |x|) and
groups of queries (which get noise), or either of them alone. For a row with clean input x,

    y[k] += eps |x| z_k,   z_k ~ N(0, 1) in R^m            forms right and full
    y[k] += eps |x| sqrt(m / r) U z_k,   z_k in R^r        form core

and the gradient of each credited weight is estimated as mean_k w_k z_k (x / |x|)^T, with x the
weight's own input. Source: DESIGN of the project, docs/activation-noise.md; node perturbation.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subzero_kernels import PURPOSE_ACTIVATION, add_noise_, stream_id

from .credit import Credit
from .hooks import Hooks
from .side_path import SidePath


@dataclass(frozen=True)
class NoisyRows:
    """The noisy rows of one axis in one pass, out of ``total`` rows of a group.

    There are as many entries as shapes tell, R, so that nothing is read from the device. Those
    that are not ``live`` fill up and stand for no row.

    index (R,) int64: the row of each entry; None: entry i is row i, R = total. ids (R,) int64: rows
    of the RNG contract. live (R,) bool.
    """

    total: int
    index: Tensor | None
    ids: Tensor
    live: Tensor

    @functools.cached_property
    def _entry(self) -> Tensor:
        """(total,) int64: the entry of each row, R where a row has none."""
        assert self.index is not None
        count = len(self.live)
        entry = self.ids.new_full((self.total + 1,), count)
        at = torch.where(self.live, self.index, self.total)
        return entry.index_copy_(0, at, torch.arange(count, device=at.device))[: self.total]

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers (R,) of the entries laid out by row: (total,), zero where a row has no entry."""
        if self.index is None:
            return numbers
        return F.pad(numbers, (0, 1)).index_select(0, self._entry)

    @functools.cached_property
    def row_ids(self) -> Tensor:
        """``ids`` by row, (total,)."""
        return self.spread(self.ids)

    @functools.cached_property
    def live_last(self) -> Tensor:
        """All entries, those that are not live first, in order otherwise: (R,) int64."""
        return torch.argsort(self.live.to(torch.int8), stable=True)


@dataclass(frozen=True)
class Pass:
    """One run of the model: ``groups`` of rows along axis 0, the first one clean if ``clean``.

    query (Q,) int64: which query each of the other groups is.
    """

    groups: int
    clean: bool
    query: Tensor
    axes: dict[str, NoisyRows]
    eps: float | Tensor
    rng: Tensor


class Tap:
    """One credited linear: adds its noise, keeps its clean rows divided by their norm.

    Attributes:
        basis: V (n, r), once it is known; kept rows are then projected: (R, r), else (R, n).
        carrier: U (m, r) in form core: the noise is U z.
        kept: entries of the step so far, one tensor for each micro-batch; zero where not live.
        recent: (x / |x|, live) of the last rows of each micro-batch, at most ``remember``.
    """

    def __init__(self, credit: Credit, wide: torch.dtype) -> None:
        self.credit = credit
        self.wide = wide
        self.stream = stream_id(PURPOSE_ACTIVATION, credit.source)
        self.remember = 4 * credit.rank
        self.basis: Tensor | None = None
        self.carrier: Tensor | None = None
        self.kept: list[Tensor] = []
        self.recent: list[tuple[Tensor, Tensor]] = []
        self._norm = torch.zeros(0)
        self._met = 0

    def begin_step(self) -> None:
        self.kept, self.recent = [], []

    def begin_pass(self) -> None:
        self._met = 0

    def meet(self, x: Tensor, y: Tensor, now: Pass) -> Tensor:
        """The output y (..., m) of input x (..., n) with this pass's noise in its noisy rows."""
        rows = now.axes.get(self.credit.axis)
        if rows is None:
            return y
        if x.numel() // x.shape[-1] != now.groups * rows.total:
            raise ValueError(
                f"{self.credit.name}: expected {now.groups} groups of {rows.total} rows, got an "
                f"input of shape {tuple(x.shape)}; freeze it with requires_grad_(False)"
            )
        self._met += 1
        if self._met > 1:
            raise ValueError(
                f"{self.credit.name}: expected to run once in a forward, it ran again; "
                "freeze it with requires_grad_(False)"
            )
        if now.clean:
            self._keep(x.reshape(now.groups, rows.total, -1)[0], rows)
        queries = len(now.query)
        if not queries or not self.credit.noisy:
            return y
        if not y.is_contiguous():
            y = y.contiguous()
        target = y.view(now.groups, rows.total, -1)[now.groups - queries :]
        scale = now.eps * self._norm
        if self.carrier is not None:
            m, r = self.carrier.shape
            scale = scale * math.sqrt(m / r)
        scale = rows.spread(scale).expand(queries, -1).contiguous()
        if self.carrier is None:
            add_noise_(target, scale, now.query, rows.row_ids, now.rng, stream=self.stream)
            return y
        inner = scale.new_zeros(queries, rows.total, r)
        add_noise_(inner, scale, now.query, rows.row_ids, now.rng, stream=self.stream)
        target.flatten(0, 1).addmm_(
            inner.flatten(0, 1).to(y.dtype), self.carrier.to(y.dtype).T
        )  # one product and one rounding; rows without noise stay as they are
        return y

    def _keep(self, x: Tensor, rows: NoisyRows) -> None:
        """|x| of the noisy rows, and x / |x|: zero where |x| is zero or not finite."""
        if rows.index is not None:
            x = x.index_select(0, rows.index)
        norm = torch.linalg.vector_norm(x, dim=1, dtype=self.wide)
        good = torch.isfinite(norm) & (norm > 0) & rows.live
        self._norm = torch.where(good, norm, 0.0)

        def unit(of: Tensor, some: Tensor | slice) -> Tensor:
            return torch.where(good[some, None], of.to(self.wide) / norm[some, None], 0.0)

        every = slice(None)
        if self.basis is None:
            self.kept.append(unit(x, every))
        elif x.dtype is torch.bfloat16 is self.basis.dtype:  # as the model's own products
            self.kept.append(unit(x @ self.basis, every))
        else:
            self.kept.append(unit(x, every) @ self.basis.to(self.wide))
        if self.remember:
            few = len(x) <= self.remember
            last = every if few else rows.live_last[-self.remember :]
            units = unit(x if few else x[last], last).to(self.credit.param.dtype)
            self.recent.append((units, rows.live[last]))


class ActivationPath(SidePath):
    """The side path W + U S V^T or W + B V^T, and the taps on the credited linears."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.taps: dict[int, Tap] = {}  # by the id of the linear's weight
        self._now: Pass | None = None

    def attach(self, model: nn.Module, hooks: Hooks) -> None:
        """Hook every module that owns a credited weight."""
        for module in model.modules():
            if any(id(p) in self.taps for p in module._parameters.values()):
                hooks.add(module.register_forward_pre_hook, self._enter, prepend=True)
                hooks.add(module.register_forward_hook, self._leave, always_call=True)

    def begin(self, now: Pass | None) -> None:
        """The pass that the next run of the model is; None: a plain one."""
        self._now = now
        for tap in self.taps.values():
            tap.begin_pass()

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        out = super()._linear(input, weight, bias)
        tap = self.taps.get(id(weight))
        if tap is None or self._now is None:
            return out
        if out is NotImplemented:
            out = F.linear(input, weight, bias)
        return tap.meet(input, out, self._now)

    def _addmm(
        self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Any:
        out = super()._addmm(input, mat1, mat2, beta=beta, alpha=alpha)
        tap = self.taps.get(id(mat2))
        if tap is None or self._now is None:
            return out
        if out is NotImplemented:
            out = torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
        return tap.meet(mat1, out, self._now)
