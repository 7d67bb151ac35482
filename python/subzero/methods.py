"""How a run trains: one small interface over SubZero, MeZO and AdamW, and what a step costs.

Costs are in forwards of one batch through the whole model, the unit in which methods compare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import MeZO, mean_loss
from .batches import Batch
from .credit import CreditPlan, blocks_in_order, first_noisy_block
from .errors import CommandError
from .hooks import eval_mode
from .models import choose_trained
from .objectives import LogitsLoss
from .optimizer import SubZero
from .rows import span
from .settings import METHODS, Settings, fill, methods_to_try

# What SubZero takes as it is called here; betas come from beta1 and beta2.
_SHARED = (
    "lr", "eps", "rank", "refresh_every", "queries", "rule", "seed", "momentum", "adam_eps",
    "weight_decay", "state_at_refresh", "fold_rounding",
)  # fmt: skip
_WEIGHT = ("sides", "apply", "reshape")
_ACTIVATION = ("form", "credit", "where", "discount")


class Method(ABC):
    """One way to train the parameters of a model that require grad."""

    optimizer: torch.optim.Optimizer  # what schedulers see

    def prepare(self, batches: list[Batch], objective: LogitsLoss) -> float:
        """Look at some training batches before the first step; returns its cost in forwards."""
        return 0.0

    @abstractmethod
    def step(self, batch: Batch, objective: LogitsLoss) -> Tensor:
        """One step; returns the loss, 0-d."""

    @abstractmethod
    def forwards(self, batch: Batch, objective: LogitsLoss) -> float:
        """What the step just made on this batch cost."""

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Steps skipped because a loss was not finite."""

    def fold(self) -> None:  # noqa: B027 - nothing to do where weights are written in each step
        """The model's parameters hold what was learned."""

    def detach(self) -> None:  # noqa: B027
        """The model is a plain model again."""

    def plan_summary(self) -> str:
        """What is trained and how, in a few lines."""
        return ""


class _SubZero(Method):
    """Either kind of noise."""

    optimizer: SubZero

    def __init__(self, model: nn.Module, s: Settings) -> None:
        values = asdict(s)
        names = _SHARED + (_ACTIVATION if s.method == "activation" else _WEIGHT)
        chosen: dict[str, Any] = {name: values[name] for name in names}
        self.model = model
        self.optimizer = SubZero(
            model, noise=s.method, betas=(values["beta1"], values["beta2"]), **chosen
        )

    def step(self, batch: Batch, objective: LogitsLoss) -> Tensor:
        return self.optimizer.step(batch, objective)

    @property
    def skipped(self) -> int:
        return self.optimizer.skipped

    def fold(self) -> None:
        self.optimizer.fold()

    def detach(self) -> None:
        self.optimizer.detach()

    def plan_summary(self) -> str:
        return self.optimizer.plan().summary()


class WeightNoise(_SubZero):
    """G groups of a batch: 2 K two-sided, K + 1 with a baseline.

    Blocks in front of the first trained one run once where the groups share a forward.
    """

    def __init__(self, model: nn.Module, s: Settings) -> None:
        super().__init__(model, s)
        self.once = _untrained_front(model)

    def forwards(self, batch: Batch, objective: LogitsLoss) -> float:
        plan = self.optimizer.plan()
        groups = self.optimizer.options.groups
        assert not isinstance(plan, CreditPlan)
        once = 0.0 if plan.one_by_one else self.once
        return once + (1 - once) * groups


class ActivationNoise(_SubZero):
    """One clean forward and K queries, of whole groups or of decoded rows.

    With a share f of the blocks from the first noisy one on, A rows decoded of T padded tokens a
    sequence: 1 + K f A / T, with whole groups 1 + K f.
    """

    def __init__(self, model: nn.Module, s: Settings) -> None:
        super().__init__(model, s)
        plan, found = self.optimizer.plan(), blocks_in_order(model)
        assert isinstance(plan, CreditPlan)
        self.plan = plan
        self.noisy = 1.0
        if found is not None:
            self.noisy = 1 - first_noisy_block(model, plan) / len(found[1])

    def prepare(self, batches: list[Batch], objective: LogitsLoss) -> float:
        if self.optimizer.options.form == "full":  # it has no bases
            return 0.0
        self.optimizer.bases_from(batches, objective)
        return float(len(batches))

    def forwards(self, batch: Batch, objective: LogitsLoss) -> float:
        share = 1.0
        if not self.plan.whole_groups:
            scored = objective.scored(batch)
            share = max(1, int(span(scored)[1].max())) / scored.shape[1]
        return 1 + self.optimizer.options.queries * self.noisy * share


class _MeZO(Method):
    optimizer: MeZO

    def __init__(self, model: nn.Module, s: Settings) -> None:
        assert s.lr is not None and s.eps is not None
        self.optimizer = MeZO(model, s.lr, s.eps, s.seed)

    def step(self, batch: Batch, objective: LogitsLoss) -> Tensor:
        return self.optimizer.step(batch, objective)

    def forwards(self, batch: Batch, objective: LogitsLoss) -> float:
        return 2.0

    @property
    def skipped(self) -> int:
        return self.optimizer.skipped


class _AdamW(Method):
    """torch's AdamW on the gradient of the same objective, without dropout."""

    def __init__(self, model: nn.Module, s: Settings) -> None:
        values = asdict(s)
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=values["lr"], betas=(values["beta1"], values["beta2"]),
            eps=values["adam_eps"], weight_decay=values["weight_decay"],
        )  # fmt: skip
        self._skipped = 0

    def step(self, batch: Batch, objective: LogitsLoss) -> Tensor:
        with eval_mode(self.model), torch.enable_grad():
            loss = mean_loss(self.model, batch, objective)
            loss.backward()
        norms = [p.grad.norm() for p in self.params if p.grad is not None]
        if not bool(torch.isfinite(torch.stack([loss.detach(), *norms]).float()).all()):
            self._skipped += 1
            self.optimizer.zero_grad()  # a step without gradients changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().float()

    def forwards(self, batch: Batch, objective: LogitsLoss) -> float:
        """A backward pass multiplies twice as much as a forward."""
        return 3.0

    @property
    def skipped(self) -> int:
        return self._skipped


_CLASSES: dict[str, type[Method]] = {
    "activation": ActivationNoise, "weight": WeightNoise, "mezo": _MeZO, "adamw": _AdamW,
}  # fmt: skip


def make_method(s: Settings, model: nn.Module) -> Method:
    """The method of filled settings, on what requires grad.

    Raises:
        ValueError, TypeError: a value out of its range, or a model the method cannot train.
    """
    return _CLASSES[s.method](model, s)  # type: ignore[call-arg]


def choose_method(
    s: Settings, model: nn.Module, labelled: bool
) -> tuple[Settings, Method, str, str]:
    """Choose what is trained and by which method.

    Args:
        labelled: whether the task has label words.

    Returns:
        settings with every value filled, the method, what is trained, and why this method.

    Raises:
        CommandError: options out of their range, nothing to train.
    """
    tries, why = methods_to_try(s)
    for method in tries:
        filled = fill(s, method, labelled)
        try:
            trained = choose_trained(
                model, filled.train_layers or "all", bool(filled.train_embeddings),
                bool(filled.train_norms), filled.train_modules or "all",
            )  # fmt: skip
            if method == "activation" and s.rank is None:
                filled = _fitting_rank(filled, model)
            made = make_method(filled, model)
            return filled, made, trained, f"{METHODS[method]} ({why})"
        except (ValueError, TypeError, CommandError) as error:
            if method == tries[-1]:
                if isinstance(error, CommandError):
                    raise
                raise CommandError(f"optimizer: {error}") from error
            why = f"not on activations: {error}"
    raise AssertionError("methods_to_try gives at least one")


def _fitting_rank(s: Settings, model: nn.Module) -> Settings:
    """The recipe's rank, or less where a trained matrix is narrower; a given one stays."""
    narrowest = min(
        (min(p.shape) for p in model.parameters() if p.requires_grad and p.dim() == 2), default=1
    )
    return replace(s, rank=min(s.rank or narrowest, narrowest))


def _untrained_front(model: nn.Module) -> float:
    """The share of the blocks in front of the first one that a step changes."""
    found = blocks_in_order(model)
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
    if found is None or any(_trained(m) for m in embeddings):
        return 0.0
    blocks = found[1]
    return next((i for i, block in enumerate(blocks) if _trained(block)), len(blocks)) / len(blocks)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
