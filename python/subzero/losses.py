"""Losses of all groups: a closure once a group, or a batch with all groups in one forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .groups import SharedPrefix, batch_size, repeat_batch
from .plan import DENSE, SIDE
from .side_path import DenseValue, GroupsDiffer, LowRank
from .weights import Weights

Signs = list[tuple[int | None, int]]


class Evaluator:
    """Calls the user's objective for every group and returns the losses (G,) fp32."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.weights = weights
        self.plan = weights.plan
        self.shared = SharedPrefix(model, {id(e.param) for e in self.plan.entries}, weights.hooks)
        self.plan.shared[:] = self.shared.names
        self._used_checked = False

    def bind(
        self, closure: Any, per_example_loss: Callable[[Any], Tensor] | None
    ) -> Callable[[Signs], Tensor]:
        """Check what the user passed, before anything is touched."""
        if per_example_loss is None:
            if not callable(closure):
                raise TypeError(
                    f"closure: expected a callable that returns a scalar loss, got "
                    f"{type(closure).__name__}; with a batch, pass per_example_loss as well"
                )
            return lambda signs: self._closure(closure, signs)
        if not callable(per_example_loss):
            raise TypeError(
                f"per_example_loss: expected a callable, got {type(per_example_loss).__name__}"
            )
        batches = closure if isinstance(closure, list) else [closure]
        if not batches:
            raise ValueError("batch: expected at least one micro-batch, got an empty list")
        for batch in batches:
            batch_size(batch)
        return lambda signs: self._batches(batches, per_example_loss, signs)

    def _closure(self, closure: Callable[[], Any], signs: Signs) -> Tensor:
        device = self.weights.decay.device
        losses = []
        for g in range(len(signs)):
            self.weights.show(g)
            losses.append(scalar_loss(closure()).to(device))
        self._check_used()
        return torch.stack(losses)

    def _batches(
        self, batches: list[Any], objective: Callable[[Any], Tensor], signs: Signs
    ) -> Tensor:
        total = sum(batch_size(b) for b in batches)
        if not self.plan.one_by_one:
            try:
                sums = [self._together(b, objective, len(signs)) for b in batches]
                self._check_used()
                return torch.stack(sums).sum(0) / total
            except GroupsDiffer as reason:
                self.plan.one_by_one = str(reason)
        losses = []
        for g in range(len(signs)):
            self.weights.show(g)
            losses.append(
                torch.stack([self._one(b, objective, 1).sum() for b in batches]).sum() / total
            )
        self._check_used()
        return torch.stack(losses)

    def _together(self, batch: Any, objective: Callable[[Any], Tensor], groups: int) -> Tensor:
        rows = groups * batch_size(batch)
        self.weights.show_all(rows)
        self.shared.groups, self.shared.rows = groups, rows
        try:
            return self._one(batch, objective, groups).view(groups, -1).sum(1)
        finally:
            self.shared.groups = self.shared.rows = 1

    def _one(self, batch: Any, objective: Callable[[Any], Tensor], groups: int) -> Tensor:
        """objective on ``groups`` copies of the batch: (groups * examples,) fp32."""
        examples = groups * batch_size(batch)
        losses = objective(repeat_batch(batch, groups))
        if not isinstance(losses, Tensor) or losses.shape != (examples,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"per_example_loss: expected one loss per example, shape ({examples},), "
                f'got {got}; use reduction="none" and average within each example'
            )
        return losses.detach().to(self.weights.decay.device, torch.float32)

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


def scalar_loss(value: Any) -> Tensor:
    """A closure's result as a 0-d fp32 tensor, or one error."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return value.detach().reshape(()).float()
        raise ValueError(
            f"closure: expected a scalar loss, got a tensor of shape {tuple(value.shape)}; "
            "return loss.mean(), or use step(batch, per_example_loss)"
        )
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(
            f"closure: expected a scalar loss (tensor or number), got {type(value).__name__}; "
            "return the loss from the closure"
        )
    return torch.tensor(float(value), dtype=torch.float32)
