"""Losses of all groups: a closure once a group, or a batch with all groups in one forward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .groups import SharedPrefix, batch_size, repeat_batch
from .objectives import LogitsLoss
from .plan import DENSE, SIDE
from .rows import real_tokens, scored_positions, with_decoder_tokens
from .side_path import DenseValue, GroupsDiffer, LowRank
from .weights import Weights

Sums = tuple[Tensor, int | Tensor]
Signs = list[tuple[int | None, int]]
Objective = Callable[..., Tensor] | LogitsLoss


@dataclass(frozen=True)
class Micro:
    """A micro-batch as the model takes it, and what is read of its losses.

    scored: mask (examples, tokens) of the tokens whose losses are read, or None. Of a LogitsLoss
    also index and valid (examples, P), and whether P suffices: 0-d bool, None where it must.
    """

    batch: Any
    scored: Tensor | None
    index: Tensor | None = None
    valid: Tensor | None = None
    fits: Tensor | None = None


class Evaluator:
    """Calls the user's objective for every group and returns the losses (G,) fp32."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.model = model
        self.weights = weights
        self.plan = weights.plan
        self.shared = SharedPrefix(model, {id(e.param) for e in self.plan.entries}, weights.hooks)
        self.plan.shared[:] = self.shared.names
        self._used_checked = False

    def bind(
        self,
        closure: Any,
        objective: Objective | None,
        positions: Any = None,
        widths: Sequence[int] | None = None,
    ) -> Callable[[Signs], Tensor]:
        """Check what the user passed, before anything is touched.

        Args:
            widths: P of each micro-batch of a LogitsLoss, if they are not to be read from the
                device. Losses of a batch that has more positions are NaN.
        """
        if objective is None:
            if not callable(closure):
                raise TypeError(
                    f"closure: expected a callable that returns a scalar loss, got "
                    f"{type(closure).__name__}; with a batch, pass an objective as well"
                )
            return lambda signs: self._closure(closure, signs)
        if not callable(objective):
            raise TypeError(f"objective: expected a callable, got {type(objective).__name__}")
        batches = closure if isinstance(closure, list) else [closure]
        if not batches:
            raise ValueError("batch: expected at least one micro-batch, got an empty list")
        masks = micro_masks(positions, len(batches))
        known = [None] * len(batches) if widths is None else widths
        micros = [
            self._micro(b, objective, m, width)
            for b, m, width in zip(batches, masks, known, strict=True)
        ]
        return lambda signs: self._batches(micros, objective, signs)

    def _micro(self, batch: Any, objective: Objective, positions: Any, width: int | None) -> Micro:
        examples = batch_size(batch)
        if isinstance(objective, LogitsLoss):
            batch = objective.prepare(self.model, batch)
            mask = objective.scored(batch, positions)
            fits = None if width is None else (mask.sum(1) <= width).all()
            return Micro(batch, mask, *objective.read(mask, positions, width), fits)
        named = with_decoder_tokens(self.model, batch)
        real = real_tokens(named, examples)
        scored = scored_positions(named, examples, real, positions)
        return Micro(batch, real if scored is None else scored)

    def _closure(self, closure: Callable[[], Any], signs: Signs) -> Tensor:
        device = self.weights.decay.device
        losses = []
        for g in range(len(signs)):
            self.weights.show(g)
            losses.append(scalar_loss(closure()).to(device))
        self._check_used()
        return torch.stack(losses)

    def _batches(self, micros: list[Micro], objective: Objective, signs: Signs) -> Tensor:
        if not self.plan.one_by_one:
            try:
                parts = [self._together(micro, objective, len(signs)) for micro in micros]
                self._check_used()
                return _mean(parts)
            except GroupsDiffer as reason:
                self.plan.one_by_one = str(reason)
        losses = []
        for g in range(len(signs)):
            self.weights.show(g)
            losses.append(_mean([self._sums(micro, objective, 1) for micro in micros]))
        self._check_used()
        return torch.cat(losses)

    def _together(self, micro: Micro, objective: Objective, groups: int) -> Sums:
        rows = groups * batch_size(micro.batch)
        self.weights.show_all(rows)
        self.shared.groups, self.shared.rows = groups, rows
        try:
            return self._sums(micro, objective, groups)
        finally:
            self.shared.groups = self.shared.rows = 1

    def _sums(self, micro: Micro, objective: Objective, groups: int) -> Sums:
        """The sum of each group's losses (groups,) fp32, and how many were summed."""
        scored = micro.scored
        examples = batch_size(micro.batch)
        repeated = repeat_batch(micro.batch, groups)
        if isinstance(objective, LogitsLoss):
            assert micro.index is not None and micro.valid is not None
            index, valid = micro.index.repeat(groups, 1), micro.valid.repeat(groups, 1)
            losses, width = objective.at(self.model, repeated, index, valid), index.shape[1]
        else:
            losses = objective(repeated)
            width = 0 if scored is None else scored.shape[1]
        rows = groups * examples
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape != (rows,) and (shape != (rows, width) or not width):
            tokens = f", or per token, shape ({rows}, {width})" if width else ""
            raise ValueError(
                f"objective: expected one loss per example, shape ({rows},){tokens}, got {shape}; "
                'use reduction="none" and average within each example'
            )
        losses = losses.detach().to(self.weights.decay.device, torch.float32)
        if micro.fits is not None:
            losses = torch.where(micro.fits, losses, math.nan)
        if losses.dim() == 1:
            return losses.view(groups, -1).sum(1), examples
        assert scored is not None
        if not isinstance(objective, LogitsLoss):
            losses = losses.masked_fill(~scored.to(losses.device).repeat(groups, 1), 0)
        return losses.view(groups, -1).sum(1), scored.sum()

    def _check_used(self) -> None:
        """After the first evaluation: name what is trained but was not evaluated where we look."""
        if self._used_checked:
            return
        self._used_checked = True
        side = self.weights.side
        tracked: list[LowRank | DenseValue] = [*side.matrices.values(), *side.dense.values()]
        unused = [t.entry.name for t in tracked if t.entry.way in (SIDE, DENSE) and not t.used]
        if unused:
            names = ", ".join(unused[:5]) + (
                f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            )
            warnings.warn(
                f"SubZero: {names} took no part in the first step's forward, or the model reads it "
                "outside its own module; freeze it, or use apply='in_place'",
                stacklevel=4,
            )


def _mean(parts: list[Sums]) -> Tensor:
    """Losses (groups,): sums of micro-batches over how many losses there were."""
    totals = [total for total, _ in parts]
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
    return total / sum(count for _, count in parts)


def micro_masks(positions: Any, count: int) -> list[Any]:
    """One mask, or None, for each micro-batch."""
    masks = positions if isinstance(positions, list) else [positions] * count
    if len(masks) != count:
        raise ValueError(
            f"positions: expected one mask for each of {count} micro-batches, got {len(masks)}; "
            "pass a list of masks"
        )
    return masks


def scalar_loss(value: Any) -> Tensor:
    """A closure's result as a 0-d fp32 tensor, or one error."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return value.detach().reshape(()).float()
        raise ValueError(
            f"closure: expected a scalar loss, got a tensor of shape {tuple(value.shape)}; "
            "return loss.mean(), or use step(batch, objective)"
        )
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(
            f"closure: expected a scalar loss (tensor or number), got {type(value).__name__}; "
            "return the loss from the closure"
        )
    return torch.tensor(float(value), dtype=torch.float32)
