"""SubZero: the step, the window, the state. Source: arXiv 2410.08989 and docs of each part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import options, state
from .hooks import attached
from .losses import Evaluator
from .plan import Plan, make_plan, one_device
from .rules import RULES, Hyper, directional
from .weights import Weights


class SubZero(torch.optim.Optimizer):
    r"""Zeroth-order optimizer in random subspaces: forward passes only.

    Each trained matrix W (m x n) has a core S (r x r, fp32) and fixed bases U (m x r), V (n x r)
    with orthonormal columns. With mu = sqrt(m n) / r and Z_k ~ N(0, 1) of shape r x r from the
    counter RNG, query k evaluates the loss with W + U (S +- eps mu Z_k) V^T, and

        rho_k = (loss_k+ - loss_k-) / (2 eps)        one scalar for the whole model
        S    <- S - lr (1/K) sum_k rho_k mu Z_k      (rule "sgd")

    Parameters with at most one dimension above 1 get plain Gaussian noise on an fp32 master.
    Source: "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", arXiv 2410.08989.

    Args:
        model: the module whose parameters with requires_grad are trained, all on one device.
        lr: learning rate. With rules sgd and momentum it multiplies rho mu Z, with norm the same
            with rho in units of the losses' spread, with adam it is a change per weight.
        eps: half the distance of the two evaluations, in units of mu Z. At least 1e-3 for 16-bit.
        rank: r, at least 1; clipped to min(m', n') of each matrix, as ``plan()`` shows.
        refresh_every: steps of a window; then W takes up U S V^T and the bases are drawn anew.
        queries: K, perturbations per step.
        sides: "two" (K pairs), "one" (a baseline and K), or "auto": two.
        rule: "sgd", "momentum", "adam" or "norm" (sgd on rho over the losses' std; K >= 4).
        apply: "forward" (side path, W read-only within a window) or "in_place" (the paper's loop).
        seed: of the RNG contract; the run is a function of it and of the losses.
        noise: "weight".
        momentum: of rule "momentum", as torch.optim.SGD.
        betas, adam_eps: of rule "adam".
        weight_decay: decoupled, on matrices only.
        state_at_refresh: "reset" or "keep" the rule's state of the cores when the bases change.
        fold_rounding: "nearest", "stochastic", or "auto": stochastic for 16-bit weights.
        reshape: "none", "square", "grouped", or "auto": near-square factors for adapter tensors.

    Raises:
        ValueError, TypeError: an argument out of its range, or a model without trained parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        rank: int = 64,
        refresh_every: int = 1000,
        queries: int = 1,
        sides: str = "auto",
        rule: str = "sgd",
        apply: str = "forward",
        seed: int = 0,
        noise: str = "weight",
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_at_refresh: str = "reset",
        fold_rounding: str = "auto",
        reshape: str = "auto",
    ) -> None:
        self.options = options.check(
            rank=rank, refresh_every=refresh_every, queries=queries, sides=sides, rule=rule,
            apply=apply, seed=seed, noise=noise, state_at_refresh=state_at_refresh,
            fold_rounding=fold_rounding, reshape=reshape,
        )  # fmt: skip
        group = dict(
            lr=lr, eps=eps, momentum=momentum, betas=tuple(betas), adam_eps=adam_eps,
            weight_decay=weight_decay,
        )  # fmt: skip
        options.check_group(group)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}; "
                "pass the model itself, not its parameters"
            )
        if attached(model):
            raise ValueError(
                "model: expected one without a SubZero optimizer, got one that has it attached; "
                "call detach() on that optimizer first"
            )
        plan = make_plan(model, rank, apply, reshape)
        if not plan.entries:
            raise ValueError(
                "model: expected at least one parameter with requires_grad=True, got none; "
                "unfreeze what should be trained with requires_grad_(True)"
            )
        device = one_device(e.param for e in plan.entries)
        super().__init__([{"params": [e.param for e in plan.entries], **group}], {})
        self.model = model
        self.steps = 0
        self.draws = 0
        self.window = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._weights = Weights(plan, self.options)
        self._weights.attach(model)
        self._evaluator = Evaluator(model, self._weights)
        self._rule_state: dict[str, dict[str, Tensor]] = {"core": {}, "dense": {}}
        for module in model.modules():
            hooks = self._weights.hooks
            hooks.add(module.register_state_dict_pre_hook, self._fold_first)
            hooks.add(module.register_load_state_dict_pre_hook, self._fold_first)
            hooks.add(module.register_load_state_dict_post_hook, self._after_load)

    # what users call

    def plan(self) -> Plan:
        """Name, shape, factors, rank, way and reason of every trained parameter; print it."""
        return self._weights.plan

    @property
    def skipped(self) -> int:
        """How many steps were skipped because a loss was not finite."""
        return int(self._skipped)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | Any,
        per_example_loss: Callable[[Any], Tensor] | None = None,
    ) -> Tensor:
        """One step: evaluate all signs and queries, then update.

        ``step(closure)``: closure() -> a scalar (0-d or one-element tensor, or number), called
        once for each sign of each query; differentiable or not.

        ``step(batch, per_example_loss)``: per_example_loss(batch) -> (examples,), evaluated for
        all signs and queries in one forward: every tensor of the batch whose axis 0 is the batch
        is repeated group by group. A list of batches is a list of micro-batches under one
        perturbation, averaged over examples.

        The model runs in eval mode and without autograd, and its modes are put back. A loss that
        is not finite skips the step and is counted in ``skipped``.

        Returns:
            0-d fp32 tensor on the device: the mean of all losses, or the baseline when one-sided.

        Raises:
            TypeError, ValueError: a loss that is no scalar, or not one per example; the weights
                are as before.
        """
        evaluate = self._evaluator.bind(closure, per_example_loss)
        if self.steps % self.options.refresh_every == 0:
            self._open_window(self.steps // self.options.refresh_every)
        opts, group = self.options, self.param_groups[0]
        options.check_group(group)
        rng = torch.tensor([opts.seed, self.draws], device=self._skipped.device)
        with self._eval_mode(), self._weights.perturbed(group["eps"], rng) as signs:
            losses = evaluate(signs)
            rho, finite = directional(losses, group["eps"], opts.two_sided, opts.rule)
            self._update(rho / opts.queries, finite, rng)
        self._skipped += ~finite
        self.steps += 1
        self.draws += opts.queries
        return losses.mean() if opts.two_sided else losses[0]

    def fold(self) -> None:
        """Write W + U S V^T into the weights, in place and in one pass; afterwards S = 0.

        Bases, rule state and counters stay, and so does the loss, up to the rounding of the store.
        """
        self._weights.fold()

    def detach(self) -> None:
        """Fold, and remove the side path: the model is a plain model again."""
        self.fold()
        self._weights.detach()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Folds, then everything a bit-exact resume needs: tensors, numbers and strings only."""
        self.fold()
        return state.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Resume bit for bit; the model must hold the weights saved with this state.

        Raises:
            ValueError: a state of another model, rank, seed, rule or contract version.
        """
        state.load(self, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One group only: parameters are chosen by requires_grad when SubZero is built."""
        if self.param_groups:
            raise ValueError(
                "param_group: expected the one group SubZero was built with; freeze or unfreeze "
                "with requires_grad_ and build SubZero again"
            )
        super().add_param_group(param_group)

    # inside a step

    def _open_window(self, window: int) -> None:
        if window == self.window:
            return
        self.fold()
        if self.options.state_at_refresh == "reset":
            self._rule_state["core"].clear()
        self._weights.draw_bases(window)
        self.window = window

    def _update(self, weight: Tensor, finite: Tensor, rng: Tensor) -> None:
        group = self.param_groups[0]
        hyper = Hyper(group["lr"], group["momentum"], group["betas"], group["adam_eps"])
        rule = RULES[self.options.rule]
        if group["weight_decay"]:
            self._weights.decay_(torch.where(finite, 1 - group["lr"] * group["weight_decay"], 1.0))
        for name, space in self._weights.spaces():
            rule(space, self._rule_state[name], weight, finite, rng, hyper)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [m for m in self.model.modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _fold_first(self, *_: Any) -> None:
        self.fold()

    def _after_load(self, module: nn.Module, *_: Any) -> None:
        self._weights.reread(module)
