"""What every set of trained weights shares: hooks, folds, rounding, copies of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from subzero_kernels import PURPOSE_ROUNDING, make_rng, stream_id

from .hooks import Hooks
from .options import Options
from .spaces import Space


class TrainedWeights(ABC):
    """The trained parameters of one model between and during steps.

    Attributes:
        plan: what is trained and how; its entries have name, index, param, rank and way.
        fold_rng: [seed, folds] on the device; the draw of stochastic rounding is how often
            weights were written.
        decay: product of (1 - lr weight_decay) since the last fold, 0-d float64.
        changed, decayed: whether a step has come since the last fold, and one that decayed.
    """

    def __init__(self, plan: Any, options: Options) -> None:
        self.plan = plan
        self.options = options
        self.hooks = Hooks(self._before_copy)
        params = [e.param for e in plan.entries]
        self.device = params[0].device
        double = any(p.dtype == torch.float64 for p in params)
        self.dtype = torch.float64 if double else torch.float32
        self.decay = torch.ones((), dtype=torch.float64, device=self.device)
        self.fold_rng = make_rng(options.seed, 0, self.device)
        self.changed = self.decayed = False
        self._owned: dict[nn.Module, dict[str, Any]] = {}

    @property
    def folds(self) -> int:
        """How often weights were written; it waits for the device."""
        return int(self.fold_rng[1])

    @folds.setter
    def folds(self, count: int) -> None:
        self.fold_rng[1:].fill_(count)

    @property
    def ready(self) -> bool:
        """Whether a step reads no value from the device."""
        return True

    def as_ready(self) -> AbstractContextManager[None]:
        """Around a capture: whatever the first steps make is there."""
        return nullcontext()

    def stepped(self, decays: bool) -> None:
        """A step was made, or replayed, which decayed the weights or not."""
        self.changed = True
        self.decayed |= decays

    def folded(self, counts: Tensor | int = 1) -> None:
        """One more fold; none where ``counts`` (0-d bool) is False."""
        self.fold_rng[1:].add_(counts)

    @abstractmethod
    def spaces(self) -> Iterator[tuple[str, Space]]:
        """What rules update, by name."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Hook the model and prepare the first window."""

    @abstractmethod
    def detach(self) -> None:
        """Remove every hook; the weights have been folded."""

    @abstractmethod
    def open_window(self, window: int, state: dict[str, dict[str, Tensor]]) -> None:
        """After a fold: the bases of a new window, and the rule state that goes with them."""

    @abstractmethod
    def resume(self, window: int, tensors: dict[str, Tensor]) -> None:
        """Take up ``tensors`` as a saved state holds them, in the window it was saved in."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a resume needs beside counters and rule state."""

    @abstractmethod
    def expects(self, name: str, value: Tensor) -> bool:
        """Whether a saved tensor of this name and shape belongs here."""

    @abstractmethod
    def missing(self, names: Collection[str]) -> str:
        """A tensor that belongs with the saved ones of these names and is not there, or ''."""

    @abstractmethod
    def decay_(self, factor: Tensor) -> None:
        """Decoupled weight decay of a step, on matrices."""

    @abstractmethod
    def fold(self) -> None:
        """Write what was learned into the weights; nothing where no step came since the last."""

    def reread(self, module: nn.Module) -> None:
        """The module's own parameters were loaded from outside (after a fold): start from them."""
        for attribute, parameter in self._owned.get(module, {}).items():
            if getattr(module, attribute) is not parameter:
                raise RuntimeError(
                    f"load_state_dict: expected to load into the trained parameter {attribute} of "
                    f"{type(module).__name__}, got a new one; load without assign=True"
                )

    def _own(self, model: nn.Module) -> None:
        trained = {id(e.param) for e in self.plan.entries}
        for module in model.modules():
            owned = {a: p for a, p in module._parameters.items() if id(p) in trained}
            if owned:
                self._owned[module] = owned

    def _rounding(self, e: Any, rng: Tensor, perturbing: bool = False) -> dict[str, Any]:
        """Stochastic for 16-bit unless asked otherwise: nearest would lose small changes."""
        choice = self.options.fold_rounding
        if choice == "auto" or perturbing:
            choice = "nearest" if e.param.dtype.itemsize >= 4 else "stochastic"
        if choice == "nearest":
            return dict(rounding=choice)
        return dict(rounding=choice, rng=rng, stream=stream_id(PURPOSE_ROUNDING, e.index))

    def _before_copy(self, memo: dict[int, Any]) -> None:
        self.fold()
        for e in self.plan.entries:
            if id(e.param) in memo:
                memo[id(e.param)].data.copy_(e.param.data)
