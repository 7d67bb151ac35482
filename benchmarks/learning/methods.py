"""The methods under study, each as one step on one batch and what that step costs.

Cost is in forwards of 16 examples through the whole model: a row through a layer counts as what it
is, head and embedding are left out. AdamW counts 3 a step (forward and backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from experiments import HeadControl, Schedule, pool_neighbours, share_noise
from torch import nn

from subzero import LogitsLoss, SubZero
from subzero.baselines import MeZO
from subzero.credit import RESIDUAL_WRITERS

Batch = dict[str, torch.Tensor]
Choice = dict[str, Any]
ALIGN_EXAMPLES = 64  # of the training set, for the first bases of forms core and right


@dataclass(frozen=True)
class Method:
    """How to train.

    Attributes:
        kind: "subzero", "mezo", "adamw" or "lora" (AdamW on a PEFT LoRA).
        options: of the optimizer; also layers (share of the layers, from the top, that is
            trained), modules ("all" linears of those or "residual", those that write to the
            stream), batch (examples a step), whole_groups, and those of experiments.py: pool
            (blocks on either side whose estimates are averaged), every (noise on every n-th
            block), control (the head's gradient as control variate), queries_end and batch_end
            (what they have become in the last part of a run).
        choices: what dev chooses from, by budget in forwards; a budget takes those of the nearest
            one below it. Each changes options, "lr" among them.
        by_token: changes for a language-model loss, whose every row is scored.
    """

    kind: str
    options: Choice = field(default_factory=dict)
    choices: dict[int, list[Choice]] = field(default_factory=dict)
    by_token: dict[int, list[Choice]] = field(default_factory=dict)

    def candidates(self, budget: float, by_token: bool) -> list[Choice]:
        """What to choose from at this budget."""
        table = self.by_token if by_token and self.by_token else self.choices
        return table[max(b for b in table if b <= budget)]


def lrs(*values: float, **changes: Any) -> list[Choice]:
    """One choice for each learning rate."""
    return [{"lr": lr, **changes} for lr in values]


_ACTIVATION: Choice = dict(
    noise="activation", credit="block", rule="muon", eps=1e-3, modules="residual"
)
_CORE: Choice = _ACTIVATION | dict(form="core", rank=64, refresh_every=25)
_RIGHT: Choice = _ACTIVATION | dict(form="right", rank=32, refresh_every=25)
_FULL: Choice = _ACTIVATION | dict(form="full")
_WHOLE: Choice = dict(queries=4, whole_groups=True)
_TOKENS: dict[int, list[Choice]] = {0: lrs(2e-3, 5e-3, 1e-2), 2000: lrs(5e-4, 1e-3, 2e-3, 5e-3)}

METHODS: dict[str, Method] = {
    "mezo": Method("mezo", dict(eps=1e-3), {0: lrs(1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)}),
    "weight-sgd": Method("subzero", dict(rank=64), {0: lrs(3e-6, 1e-5, 3e-5, 1e-4, 3e-4)}),
    "weight-norm": Method(
        "subzero", dict(rank=16, rule="norm", queries=8, sides="one"),
        {0: lrs(1e-2, 3e-2, 1e-1), 2000: lrs(1e-2, 3e-2)},
    ),
    "weight-muon": Method(
        "subzero", dict(rank=16, rule="muon", queries=8, sides="one"),
        {0: lrs(1e-3, 3e-3, 1e-2, 3e-2), 2000: lrs(1e-3, 3e-3, 1e-2)},
    ),
    "core-whole": Method(
        "subzero", _CORE | _WHOLE, {0: lrs(1e-2, 2e-2), 2000: lrs(5e-3, 1e-2)}, _TOKENS,
    ),
    "right-whole": Method(
        "subzero", _RIGHT | _WHOLE, {0: lrs(1e-2, 2e-2), 2000: lrs(2e-3, 5e-3)}, _TOKENS,
    ),
    "full-whole": Method(
        "subzero", _FULL | _WHOLE, {0: lrs(5e-3, 1e-2), 2000: lrs(2e-3, 5e-3)}, _TOKENS,
    ),
    "core-rows": Method(
        "subzero", _CORE | dict(queries=32),
        {0: lrs(2e-2, 4e-2), 300: lrs(2e-2, modules="all", queries=64) + lrs(2e-2, 4e-2),
         2000: lrs(5e-3, 1e-2, modules="all", queries=64) + lrs(3e-3, 1e-2, queries=64)},
    ),
    "right-rows": Method(
        "subzero", _RIGHT | dict(queries=32),
        {0: lrs(1e-2, 2e-2), 300: lrs(1e-2, modules="all", queries=64) + lrs(2e-2),
         2000: lrs(3e-3, 1e-2, modules="all", queries=64) + lrs(3e-3, queries=64)},
    ),
    "full-rows": Method(
        "subzero", _FULL | dict(queries=32),
        {0: lrs(1e-2, 2e-2), 300: lrs(7e-3, modules="all") + lrs(7e-3, queries=64),
         2000: lrs(2e-3, 5e-3, modules="all", queries=64) + lrs(3e-3, queries=64)},
    ),
    "adamw": Method("adamw", {}, {0: lrs(1e-5, 3e-5, 1e-4, 3e-4), 2000: lrs(1e-5, 3e-5)}),
    "adamw-lora": Method(
        "lora", dict(rank=16), {0: lrs(3e-4, 1e-3, 3e-3, 1e-2), 2000: lrs(1e-4, 3e-4, 1e-3)}
    ),
}  # fmt: skip


def choose_trained(model: nn.Module, layers: float, modules: str) -> float:
    """requires_grad for the method's linears; the share of the layers from the first one on."""
    count = model.config.num_hidden_layers
    first = round(count * (1 - layers))
    for name, p in model.named_parameters():
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
        linear = p.dim() == 2 and layer >= first
        chosen = modules == "all" or (len(parts) > 1 and parts[-2] in RESIDUAL_WRITERS)
        p.requires_grad_(linear and chosen)
    return 1 - first / count


class Stepper:
    """One method on one model: ``step(batch)`` trains and returns (loss, cost)."""

    def __init__(
        self, method: Method, choice: Choice, model: nn.Module, objective: LogitsLoss, seed: int
    ):
        options = method.options | choice
        self.lr = options.pop("lr")
        self.schedule = Schedule(options)
        self.batch = options.pop("batch", 16)
        whole, pool = options.pop("whole_groups", False), options.pop("pool", 0)
        every, control = options.pop("every", 1), options.pop("control", False)
        self.share = choose_trained(
            model, options.pop("layers", 0.5), options.pop("modules", "all")
        )
        self.objective = objective
        self.model = model
        self.optimizer: Any
        self.control: HeadControl | None = None
        if method.kind == "subzero":
            self.optimizer = SubZero(model, lr=0.0, seed=seed, **options)
            self.step = self._weight_noise
            if options.get("noise") == "activation":
                self.step = self._activation_noise
                if whole:
                    self.optimizer.evaluate_whole_groups("as the study asks")
                weights = self.optimizer._weights
                if pool:
                    pool_neighbours(weights.space, pool)
                if every > 1:
                    share_noise(weights, every)
                if control:
                    self.control = HeadControl(weights, model, objective)
        elif method.kind == "mezo":
            self.optimizer = MeZO(model, lr=0.0, seed=seed, **options)
            self.step = self._mezo
        else:
            torch.manual_seed(seed)
            if method.kind == "lora":
                self.model = self._with_lora(options.pop("rank"))
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
            self.step = self._first_order
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def _with_lora(self, rank: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        named = self.model.named_parameters()
        names = [name.removesuffix(".weight") for name, p in named if p.requires_grad]
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)
        return get_peft_model(self.model, config)

    def align(self, source: Iterator[Batch]) -> float:
        """First bases of forms core and right from plain forwards; what they cost."""
        options = getattr(self.optimizer, "options", None)
        if options is None or not options.activation or options.form == "full":
            return 0.0
        count = max(1, ALIGN_EXAMPLES // self.batch)
        self.optimizer.bases_from([next(source) for _ in range(count)], self.objective)
        return count * self.batch / 16

    @property
    def skipped(self) -> int:
        """Steps whose loss was not finite."""
        return int(getattr(self.optimizer, "skipped", 0))

    def set_lr(self, factor: float) -> None:
        """The schedule's factor on the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.lr * factor

    def begin_part(self, share: float) -> bool:
        """Follow the schedule, when this share of the run is over; whether the batch changed."""
        now, before = self.schedule.at(share), self.batch
        self.batch = now.get("batch", before)
        if "queries" in now:  # options are frozen, and the optimizer's parts share them
            object.__setattr__(self.optimizer.options, "queries", now["queries"])
        return self.batch != before

    def _activation_noise(self, batch: Batch) -> tuple[torch.Tensor, float]:
        if self.control is not None:
            self.control.begin(batch)
        loss = self.optimizer.step(batch, self.objective)
        tokens = decoded = batch["input_ids"].shape[1]
        if not self.optimizer.plan().whole_groups:
            scored = self.objective.scored(batch)
            example, position = scored.nonzero(as_tuple=True)
            decoded = int((position - scored.int().argmax(1)[example]).max()) + 1
        cost = 1 + self.optimizer.options.queries * self.share * decoded / tokens
        return loss, cost * self.batch / 16

    def _weight_noise(self, batch: Batch) -> tuple[torch.Tensor, float]:
        loss = self.optimizer.step(batch, self.objective)
        return loss, (1 + (self.optimizer.options.groups - 1) * self.share) * self.batch / 16

    def _mezo(self, batch: Batch) -> tuple[torch.Tensor, float]:
        return self.optimizer.step(batch, self.objective), 2 * self.batch / 16

    def _first_order(self, batch: Batch) -> tuple[torch.Tensor, float]:
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.objective(self.model, batch)
        count = losses.numel() if losses.dim() == 1 else self.objective.scored(batch).sum()
        loss = losses.sum() / count
        loss.backward()
        self.optimizer.step()
        return loss.detach(), 3 * self.batch / 16

    @torch.no_grad()
    def weights(self) -> list[torch.Tensor]:
        """A copy of what is trained, as the model holds it now."""
        if hasattr(self.optimizer, "fold"):
            self.optimizer.fold()
        return [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def restore(self, weights: list[torch.Tensor]) -> None:
        """Put a copy back; training is over."""
        if hasattr(self.optimizer, "detach"):
            self.optimizer.detach()
        for p, saved in zip(self.trained, weights, strict=True):
            p.copy_(saved)

    def close(self) -> None:
        """The model as plain as it was."""
        if self.control is not None:
            self.control.hook.remove()
        if hasattr(self.optimizer, "detach"):
            self.optimizer.detach()
        if hasattr(self.model, "peft_config"):
            self.model.unload()
        self.optimizer = None
