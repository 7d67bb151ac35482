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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subzero_kernels import PURPOSE_ACTIVATION, add_noise_, stream_id

from .credit import Credit
from .hooks import Hooks
from .side_path import SidePath

# Of so many rows or fewer the linears' work is done together, after the forward that brought them.
_FEW_ROWS = 64
_NO_ROWS = torch.zeros(0, device="cpu")


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
        """Numbers (..., R) of entries laid out by row: (..., total), zero where a row has none."""
        if self.index is None:
            return numbers
        return F.pad(numbers, (0, 1)).index_select(-1, self._entry)

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
        fresh: clean rows (R, n) of the last pass, where few enough to wait for those of others.
        kept: entries of the step so far, one tensor for each micro-batch; zero where not live.
        recent: (x / |x|, live) of the last rows of each micro-batch, at most ``remember``.
        noise: what this pass adds, if it is known before: scales (K, total), in form core K groups
            of rows of z, scaled.
    """

    def __init__(self, credit: Credit, wide: torch.dtype) -> None:
        self.credit = credit
        self.wide = wide
        self.stream = stream_id(PURPOSE_ACTIVATION, credit.source)
        self.remember = 4 * credit.rank
        self.basis: Tensor | None = None
        self.carrier: Tensor | None = None
        self.fresh: Tensor | None = None
        self.kept: list[Tensor] = []
        self.recent: list[tuple[Tensor, Tensor]] = []
        self.noise: Tensor | None = None
        self._norm = _NO_ROWS
        self._met = 0

    def begin_step(self) -> None:
        self.fresh, self.kept, self.recent = None, [], []

    def begin_pass(self, clean: bool) -> None:
        self._met, self.noise = 0, None
        if clean:
            self._norm = _NO_ROWS

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
        noisy = self.credit.noisy and bool(len(now.query))
        if now.clean:
            self._meet_clean(x.reshape(now.groups, rows.total, -1)[0], rows, noisy)
        if not noisy:
            return y
        if not y.is_contiguous():
            y = y.contiguous()
        if self.noise is None:
            prepare_noise([self], rows, now)
        assert self.noise is not None
        target = y.view(now.groups, rows.total, -1)[now.groups - len(now.query) :]
        if self.carrier is None:
            add_noise_(target, self.noise, now.query, rows.row_ids, now.rng, stream=self.stream)
            return y
        # one product and one rounding; rows without noise stay as they are
        inner, carrier = self.noise.flatten(0, 1).to(y.dtype), self.carrier.to(y.dtype)
        target.flatten(0, 1).addmm_(inner, carrier.T)
        return y

    def _meet_clean(self, x: Tensor, rows: NoisyRows, noisy: bool) -> None:
        if rows.index is not None:
            x = x.index_select(0, rows.index)
        few = len(x) <= _FEW_ROWS
        if few:  # a copy: the model may go on in the memory of its input
            self.fresh = x.clone() if rows.index is None else x
        if not few or noisy:
            norm, good = norms(x, rows.live, self.wide)
            self._norm = norm
        if not few:
            self.kept.append(kept(x, norm, good, self.basis))
            if self.remember:
                last = rows.live_last[-self.remember :]
                units = directions(x[last], norm[last], good[last])
                self.recent.append((units.to(self.credit.param.dtype), rows.live[last]))


# ---- of one linear, x (R, n), or of several together, (linears, R, n)


def norms(x: Tensor, live: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """|x| (..., R) in fp32 or wider, zero where not good, and good: finite, not zero, and live."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    good = (norm > 0) & (norm < math.inf) & live
    return torch.where(good, norm, 0.0), good


def directions(x: Tensor, norm: Tensor, good: Tensor) -> Tensor:
    """x / |x| (..., R, n) in the norm's dtype, zero where not good."""
    return torch.where(good[..., None], x.to(norm.dtype) / norm[..., None], 0.0)


def kept(x: Tensor, norm: Tensor, good: Tensor, basis: Tensor | None) -> Tensor:
    """x / |x| (..., R, n), or V^T x / |x| (..., R, r) with V (..., n, r)."""
    if basis is None:
        return directions(x, norm, good)
    if x.dtype is torch.bfloat16 is basis.dtype:  # rounded as the model's own products are
        return directions(x @ basis, norm, good)
    return directions(x, norm, good) @ basis.to(norm.dtype)


def prepare_noise(taps: Sequence[Tap], rows: NoisyRows, now: Pass) -> None:
    """``noise`` of linears of one shape, whose norms are known."""
    first, queries = taps[0], len(now.query)
    norm = torch.stack([tap._norm for tap in taps]) if len(taps) > 1 else first._norm[None]
    scale = now.eps * norm
    if first.carrier is not None:
        m, r = first.carrier.shape
        scale = scale * math.sqrt(m / r)
    scale = rows.spread(scale)[:, None].expand(-1, queries, -1).contiguous()
    if first.carrier is None:
        for tap, each in zip(taps, scale, strict=True):
            tap.noise = each
        return
    inner = scale.new_zeros(*scale.shape, r)
    for tap, each, by in zip(taps, inner, scale, strict=True):
        add_noise_(each, by, now.query, rows.row_ids, now.rng, stream=tap.stream)
    inner = inner.to(first.carrier.dtype)
    for tap, each in zip(taps, inner, strict=True):
        tap.noise = each


class TapStack:
    """Linears of one shape, dtype and axis: one launch serves the few rows of all of them.

    ``bases`` (linears, n, r): the memory of their V, None until it is first known.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = list(taps)
        self.bases: Tensor | None = None
        self._noisy = [tap for tap in taps if tap.credit.noisy]

    def settle(self, now: Pass) -> None:
        """Norms and kept rows of what the last clean pass left."""
        met = [tap for tap in self.taps if tap.fresh is not None]
        if not met:
            return
        first, rows = met[0], now.axes[met[0].credit.axis]
        x = torch.stack([tap.fresh for tap in met if tap.fresh is not None])
        norm, good = norms(x, rows.live, first.wide)
        basis = self.bases if first.basis is not None else None
        if basis is not None and len(met) < len(self.taps):
            basis = torch.stack([tap.basis for tap in met if tap.basis is not None])
        projected = kept(x, norm, good, basis)
        units = None
        if first.remember:
            last: Any = slice(None)
            if x.shape[1] > first.remember:
                last = rows.live_last[-first.remember :]
            units = directions(x[:, last], norm[:, last], good[:, last])
            units, live = units.to(first.credit.param.dtype), rows.live[last]
        for i, tap in enumerate(met):
            tap.fresh, tap._norm = None, norm[i]
            tap.kept.append(projected[i])
            if units is not None:
                tap.recent.append((units[i], live))

    def prepare(self, now: Pass) -> None:
        """The noise of a pass whose norms are known."""
        rows = now.axes.get(self.taps[0].credit.axis)
        noisy = [tap for tap in self._noisy if len(tap._norm)]
        if rows is not None and noisy and len(now.query):
            prepare_noise(noisy, rows, now)


def stacks_of(taps: Sequence[Tap]) -> list[TapStack]:
    """Every linear, with those of its shape."""
    alike: dict[Any, list[Tap]] = {}
    for tap in taps:
        c = tap.credit
        alike.setdefault((c.m, c.n, c.param.dtype, c.axis), []).append(tap)
    return [TapStack(some) for some in alike.values()]


class ActivationPath(SidePath):
    """The side path W + U S V^T or W + B V^T, and the taps on the credited linears."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.taps: dict[int, Tap] = {}  # by the id of the linear's weight
        self.stacks: list[TapStack] = []
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
            tap.begin_pass(now is not None and now.clean)

    def settle(self) -> None:
        """After a clean pass: work on the rows that it left, all linears of a shape together."""
        assert self._now is not None
        for stack in self.stacks:
            stack.settle(self._now)

    def prepare(self) -> None:
        """Before a pass without a clean group: its noise, as far as it can be made together."""
        assert self._now is not None
        for stack in self.stacks:
            stack.prepare(self._now)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        out = super()._linear(input, weight, bias)
        tap = self.taps.get(id(weight))
        if tap is None or self._now is None:
            return out
        if out is NotImplemented:
            out = F.linear(input, weight, bias)
        return tap.meet(input, out, self._now)

    def selects_rows(self, weight: Tensor) -> bool:
        return id(weight) not in self.taps  # whose noise is that of all outputs

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
