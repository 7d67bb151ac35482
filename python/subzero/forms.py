"""What activation noise trains, and where its numbers live: forms core, right and full.

    core    W + U S V^T     S (r, r) += sqrt(m / r) sum w z (V^T x / |x|)^T
    right   W + B V^T       B (m, r) += sum w z (V^T x / |x|)^T
    full    W itself        W (m, n) += sum w z (x / |x|)^T, written in place each step

A space adds the contract's noise, regenerated from (seed, stream, draw), to buffers of its own
layout, weighed row by row; rules (rules.py) need nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subzero_kernels import PURPOSE_ROUNDING, fold_, noise_outer_, stream_id
from subzero_kernels.rng import round_stochastic, words

from .activation import Tap
from .credit import Credit
from .spaces import Space

RowWeights = dict[str, Tensor]

# Columns of its second factor up to which noise_outer_ makes the noise where it multiplies it.
_FAST_COLUMNS = 128


class CreditSpace(Space):
    """S or B of every credited weight, in one flat buffer.

    The weights of a step's rows come as one tensor (K, rows of all axes), as ``set_rows`` lays
    them out, with ``finite``: whether the step counts.
    """

    def __init__(self, taps: Sequence[Tap], dtype: torch.dtype) -> None:
        self.taps = list(taps)
        credits = [tap.credit for tap in self.taps]
        super().__init__(credits, [c.shape for c in credits], dtype)
        device = self.value.device
        self._sizes = torch.tensor([math.prod(c.shape) for c in credits], device=device)
        self._units = self.value.new_tensor([_change_per_weight(c) for c in credits])
        self._rows: dict[str, tuple[slice, Tensor]] = {}
        self._together = _of_one_noise(self.taps)
        self.finite = torch.ones((), dtype=torch.bool, device=self.value.device)

    @functools.cached_property
    def scale(self) -> Tensor:  # type: ignore[override]
        """What makes a state's entry of 1 a change of 1 per weight; as large as the state."""
        return self._units.repeat_interleave(self._sizes, output_size=self.size)

    def set_rows(self, weight: RowWeights, ids: RowWeights, finite: Tensor) -> Tensor:
        """Lay out a step's rows: (K, rows), what rules then multiply."""
        start, self.finite = 0, finite
        for axis, some in ids.items():
            self._rows[axis] = slice(start, start + len(some)), some
            start += len(some)
        parts = list(weight.values())
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(self.value.dtype)

    def rows_of(self, tap: Tap, coeff: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """(weight (K, R), a (R, r or n), ids (R,)) of a tap's rows, or None where it met none."""
        if tap.credit.axis not in self._rows or not tap.kept:
            return None
        part, ids = self._rows[tap.credit.axis]
        kept = tap.kept[0] if len(tap.kept) == 1 else torch.cat(tap.kept)
        return coeff[:, part], kept.to(self.value.dtype), ids

    def add_noise_(self, flat: Tensor, coeff: Tensor, rng: Tensor, *, scaled: bool = True) -> None:
        """flat += sum_k sum_i coeff[k, i] z_(draw+k)[i] a[i]^T; coeff (K, rows)."""
        scaled_by: dict[float, Tensor] = {}
        views = self.views(flat)
        for members in self._together:
            tap = self.taps[members[0]]
            credit = tap.credit
            by = math.sqrt(credit.m / credit.rank) if scaled and credit.form == "core" else 1.0
            if by not in scaled_by:
                scaled_by[by] = coeff if by == 1.0 else coeff * by
            met = [
                (i, rows) for i in members if (rows := self.rows_of(self.taps[i], scaled_by[by]))
            ]
            if not met:
                continue
            weight, kept, ids = met[0][1]
            weight = weight.contiguous()
            if len(met) == 1:
                noise_outer_(views[met[0][0]], weight, kept, ids, rng, stream=tap.stream, beta=1.0)
                continue
            kept = torch.cat([rows[1] for _, rows in met], 1)
            change = kept.new_empty(credit.shape[0], kept.shape[1])
            noise_outer_(change, weight, kept, ids, rng, stream=tap.stream)
            for (i, _), part in zip(met, change.split(credit.rank, 1), strict=True):
                views[i].add_(part)

    def width(self, i: int) -> int:
        """max(m, n) of the weight, whatever is kept of it."""
        return max(self.taps[i].credit.m, self.taps[i].credit.n)


class FullSpace(CreditSpace):
    """The weights themselves: rules without a state write noise straight into them.

    ``decay`` (0-d) is what the next write multiplies a weight by; None: nothing decays. A step
    that is skipped writes the values that are there.
    """

    def __init__(self, taps: Sequence[Tap], dtype: torch.dtype, weights: Any) -> None:
        self.weights = weights
        super().__init__(taps, dtype)
        self.decay: Tensor | None = None

    @functools.cached_property
    def scale(self) -> Tensor:  # type: ignore[override]
        """A weight is its own unit."""
        return self.value.new_ones(())

    def allocate(self) -> Tensor:
        """No second copy of the weights: ``value`` stays empty."""
        return torch.zeros(0, dtype=self.dtype, device=self.entries[0].param.device)

    def descend_(self, coeff: Tensor, rng: Tensor) -> None:
        """W = decay W + sum_k sum_i coeff[k, i] z_(draw+k)[i] (x_i / |x_i|)^T."""
        for tap in self.taps:
            rows = self.rows_of(tap, coeff)
            if rows is None:
                continue
            weight, units, ids = rows
            credit, count = tap.credit, len(ids)
            weight = weight.contiguous()
            if count > min(credit.m, credit.n) or self.decay is not None:
                change = units.new_empty(credit.m, credit.n)
                noise_outer_(change, weight, units, ids, rng, stream=tap.stream)
                self.write(credit, change)
                continue
            noise = units.new_empty(credit.m, count)
            eye = torch.eye(count, dtype=units.dtype, device=units.device)
            noise_outer_(noise, weight, eye, ids, rng, stream=tap.stream)
            u, v = noise, units.T.contiguous()
            if credit.transposed:
                u, v = v, u
            rounding = self.weights._rounding(credit, self.weights.fold_rng)
            fold_(credit.param.data, u, v, eye, **rounding)
        self.finish()

    def subtract_(self, flat: Tensor) -> None:
        """W = decay W - flat."""
        for tap, change in zip(self.taps, self.views(flat), strict=True):
            self.write(tap.credit, -change)
        self.finish()

    def subtract_stack_(self, members: Sequence[int], x: Tensor, factor: Tensor) -> None:
        """W_i = decay W_i - factor_i x_i, for some weights; ``finish`` ends the step's writes."""
        for i, change, by in zip(members, x, factor, strict=True):
            self.write(self.taps[i].credit, -by * change)

    def finish(self) -> None:
        """Weights were written once more, in a step that counts."""
        self.weights.folded(self.finite)
        self.decay = None

    def write(self, credit: Credit, change: Tensor) -> None:
        """W = decay W + change (m, n), rounded once."""
        w = credit.param.data
        value = w.to(change.dtype)
        if self.decay is not None:
            value = self.decay * value
        value = value + (change.T if credit.transposed else change)
        how = self.weights._rounding(credit, self.weights.fold_rng)
        if how["rounding"] == "stochastic" and w.dtype.itemsize < 4:
            word = words(how["rng"], stream_id(PURPOSE_ROUNDING, credit.index), w.numel())
            value = round_stochastic(value, word.view(w.shape), w.dtype)
        w.copy_(value)


def _of_one_noise(taps: Sequence[Tap]) -> list[list[int]]:
    """Linears that one noise credits, as many as noise_outer_ is fast for: it is made once."""
    alike: dict[tuple[int, str], list[int]] = {}
    for i, tap in enumerate(taps):
        alike.setdefault((tap.stream, tap.credit.axis), []).append(i)
    rank = taps[0].credit.rank
    most = max(1, _FAST_COLUMNS // rank) if rank else 1
    return [
        members[start : start + most]
        for members in alike.values()
        for start in range(0, len(members), most)
    ]


def _change_per_weight(credit: Credit) -> float:
    """The factor that makes a state's entry of 1 a root-mean-square change of 1 per weight."""
    if credit.form == "full":
        return 1.0
    if credit.form == "core":
        return math.sqrt(credit.m * credit.n) / credit.rank
    return math.sqrt(credit.n / credit.rank)
