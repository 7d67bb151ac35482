"""Noise in the activations: where it enters, what is kept of the rows it credits.

A linear y = x W^T meets, in one pass over the model, the clean group (which gives x and |x|) and
groups of queries (which get noise), or either of them alone. For a row with clean input x,

    y[k] += eps |x| z_k,   z_k ~ N(0, 1) in R^m            forms right and full
    y[k] += eps |x| sqrt(m / r) U z_k,   z_k in R^r        form core

and the gradient of each credited weight is estimated as mean_k w_k z_k (x / |x|)^T, with x the
weight's own input. Source: DESIGN of the project, docs/activation-noise.md; node perturbation.
"""

from __future__ import annotations

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

    index (R,) int64: which rows of a group, ascending. ids (R,) int64: rows of the RNG contract.
    """

    total: int
    index: Tensor
    ids: Tensor


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
        basis: V (n, r), once it is known; kept rows are then projected: (rows, r), else (rows, n).
        carrier: U (m, r) in form core: the noise is U z.
        kept: rows of the step so far, one tensor for each micro-batch.
        recent: x / |x| of the last rows of the step, at most ``remember`` of them, where asked.
    """

    def __init__(self, credit: Credit, wide: torch.dtype) -> None:
        self.credit = credit
        self.wide = wide
        self.stream = stream_id(PURPOSE_ACTIVATION, credit.source)
        self.remember = 4 * credit.rank
        self.basis: Tensor | None = None
        self.carrier: Tensor | None = None
        self.kept: list[Tensor] = []
        self.recent: list[Tensor] = []
        self._norm = torch.zeros(0)
        self._met = 0

    def begin_step(self) -> None:
        self.kept, self.recent = [], []

    def begin_pass(self) -> None:
        self._met = 0

    def drop_last(self) -> None:
        """Forget the rows of the last clean forward."""
        del self.kept[-1:], self.recent[-1:]

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
            self._keep(x.reshape(now.groups, rows.total, -1)[0].index_select(0, rows.index))
        queries = len(now.query)
        if not queries or not self.credit.noisy:
            return y
        if not y.is_contiguous():
            y = y.contiguous()
        target = y.view(now.groups, rows.total, -1)[now.groups - queries :]
        scale = now.eps * self._norm
        if self.carrier is None:
            spread = scale.new_zeros(rows.total).index_copy_(0, rows.index, scale)
            ids = rows.ids.new_zeros(rows.total).index_copy_(0, rows.index, rows.ids)
            spread = spread.expand(queries, -1).contiguous()
            add_noise_(target, spread, now.query, ids, now.rng, stream=self.stream)
            return y
        m, r = self.carrier.shape
        inner = scale.new_zeros(queries, len(rows.index), r)
        scale = (scale * math.sqrt(m / r)).expand(queries, -1).contiguous()
        add_noise_(inner, scale, now.query, rows.ids, now.rng, stream=self.stream)
        tail = inner @ self.carrier.to(self.wide).T
        target.index_add_(1, rows.index, tail.to(y.dtype))
        return y

    def _keep(self, x: Tensor) -> None:
        """|x| of the noisy rows, and x / |x|: zero where |x| is zero or not finite."""
        x = x.to(self.wide)
        norm = torch.linalg.vector_norm(x, dim=1)
        good = torch.isfinite(norm) & (norm > 0)
        self._norm = torch.where(good, norm, 0.0)
        unit = torch.where(good[:, None], x / norm[:, None], 0.0)
        if self.remember:
            self.recent.append(unit[-self.remember :])
        self.kept.append(unit if self.basis is None else unit @ self.basis.to(self.wide))


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
