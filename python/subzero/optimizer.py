"""SubZero: the step, the window, the state. Source: arXiv 2410.08989 and docs of each part."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subzero_kernels import make_rng

from . import options, state
from .activation_weights import ActivationWeights
from .adapter import export_lora
from .capture import CapturedStep, GraphMemory
from .credit import CreditPlan, make_credit_plan
from .hooks import attached, eval_mode
from .hyper import Numbers
from .losses import Evaluator, Signs
from .micros import Micro
from .objectives import LogitsLoss
from .plan import Plan, make_plan, one_device
from .queries import ActivationEvaluator
from .recording import Recording
from .rules import RULES, directional, where
from .weights import Weights


class SubZero(Recording, torch.optim.Optimizer):
    r"""Zeroth-order optimizer in random subspaces: forward passes only.

    Each trained matrix W (m x n) has a core S (r x r, fp32) and fixed bases U (m x r), V (n x r)
    with orthonormal columns. With mu = sqrt(m n) / r and Z_k ~ N(0, 1) of shape r x r from the
    counter RNG, query k evaluates the loss with W + U (S +- eps mu Z_k) V^T, and

        rho_k = (loss_k+ - loss_k-) / (2 eps)        one scalar for the whole model
        S    <- S - lr (1/K) sum_k rho_k mu Z_k      (rule "sgd")

    Parameters with at most one dimension above 1 get plain Gaussian noise on an fp32 master.
    Source: "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", arXiv 2410.08989.

    With noise="activation" every example (or token) meets its own noise in the outputs of linears,

        y[k] += eps |x| z_k,   W's gradient ~ mean_k ((loss_k - loss) / s) z_k (x / |x|)^T

    which needs far fewer forwards: docs/activation-noise.md.

    Args:
        model: the module whose parameters with requires_grad are trained, all on one device.
        lr: learning rate. With rules sgd and momentum it multiplies rho mu Z, with norm the same
            with rho in units of the losses' spread, with adam it is a change per weight.
        eps: half the distance of the two evaluations, in units of mu Z. At least 1e-3 for 16-bit.
            With activation noise: its size relative to |x|; at least 1e-2 for bf16.
        rank: r, at least 1; clipped to min(m', n') of each matrix, as ``plan()`` shows. With
            activation noise it must be at most min(m, n) of every credited weight.
        refresh_every: steps of a window; then W takes up U S V^T and the bases are drawn anew.
        queries: K, perturbations per step.
        sides: "two" (K pairs), "one" (a baseline and K), or "auto": two for weight noise, one
            for activation noise, which knows no other.
        rule: "sgd", "momentum", "adam", "norm" (sgd on rho over the losses' std) or "muon"
            (orthogonalised momentum on norm's coefficients). With weight noise norm and muon
            need K >= 4.
        apply: "forward" (side path, W read-only within a window) or "in_place" (the paper's loop).
        seed: of the RNG contract; the run is a function of it and of the losses.
        noise: "weight" or "activation"; form, credit, where and discount belong to the latter.
        form: "right" (W + B V^T), "core" (W + U S V^T), both with W read-only within a window, or
            "full" (W written in each step).
        credit: "block" (the linears that write to the residual stream share the noise on the last
            one's output in their block) or "own" (each linear has its own).
        where: "loss" (noise in the rows whose logits the loss reads) or "all" real rows.
        discount: how much a token's noise is credited with the losses of later tokens, 0 to 1.
        momentum: of rules "momentum", as torch.optim.SGD, and "muon".
        betas, adam_eps: of rule "adam".
        weight_decay: decoupled, on matrices only.
        state_at_refresh: "reset" or "keep" the rule's state of the cores when the bases change;
            form full has none, and always keeps its state.
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
        form: str = "right",
        credit: str = "block",
        where: str = "loss",
        discount: float = 0.0,
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
            fold_rounding=fold_rounding, reshape=reshape, form=form, credit=credit, where=where,
            discount=discount,
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
        plan: Plan | CreditPlan
        if self.options.activation:
            plan = make_credit_plan(model, form, credit, where, rank)
        else:
            plan = make_plan(model, rank, apply, reshape)
        if not plan.entries:
            raise ValueError(
                "model: expected at least one parameter with requires_grad=True, got none; "
                "unfreeze what should be trained with requires_grad_(True)"
            )
        params = [e.param for e in plan.entries]
        device = one_device(params)
        super().__init__([{"params": params, **group}], {})
        self.model = model
        self.steps = 0
        self.window = 0
        self._rng = make_rng(seed, 0, device)  # draw: the queries so far
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._numbers = Numbers(device)
        self._numbers.follow(group)
        self._rehearsing = self._capturing = False
        self._graph_memory: GraphMemory | None = None
        self._weights: Weights | ActivationWeights
        if isinstance(plan, CreditPlan):
            self._weights = ActivationWeights(plan, self.options)
            self._weights.attach(model)
            self._queries = ActivationEvaluator(model, self._weights, self.options)
        else:
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

    def plan(self) -> Plan | CreditPlan:
        """Name, shape, rank, way and reason of every trained parameter; print it.

        With activation noise: which linear is noisy, what credits which weight, why one is not,
        and whether a query costs a row.
        """
        return self._weights.plan

    @property
    def skipped(self) -> int:
        """How many steps were skipped because a loss was not finite; it waits for the device."""
        return int(self._skipped)

    @property
    def draws(self) -> int:
        """How many queries have drawn noise, those of skipped steps too; it waits for the device.

        May be set: the next step draws from there.
        """
        return int(self._rng[1])

    @draws.setter
    def draws(self, count: int) -> None:
        self._rng[1:].fill_(count)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | Any,
        objective: Callable[[Any], Tensor] | LogitsLoss | None = None,
        positions: Tensor | list[Tensor] | None = None,
    ) -> Tensor:
        """One step: evaluate all signs and queries, then update.

        ``step(closure)``: closure() -> a scalar (0-d or one-element tensor, or number), called
        once for each sign of each query; differentiable or not. Weight noise only.

        ``step(batch, objective)``: objective(batch) -> (examples,) or (examples, tokens), or a
        LogitsLoss, evaluated for all signs and queries in one forward: every tensor of the batch
        whose axis 0 is the batch is repeated group by group. A list of batches is a list of
        micro-batches under one perturbation, averaged over examples (or scored tokens).

        ``positions``: mask (examples, tokens) of the tokens whose logits the loss reads, a list
        of masks for micro-batches. Without it: the LogitsLoss's own, else those before labels
        other than -100. Token losses are read there only.

        The model runs in eval mode and without autograd, and its modes are put back. A loss that
        is not finite skips the step and is counted in ``skipped``.

        Returns:
            0-d fp32 tensor on the device: the mean of all losses, or the baseline when one-sided.

        Raises:
            TypeError, ValueError: a loss that is no scalar, or not one per example or token; the
                weights are as before.
        """
        self._read_group()
        evaluate_and_update = self._bind(closure, objective, positions)
        self._open_window()
        loss, finite = evaluate_and_update()
        self._count(finite)
        self.steps += 1
        self._record_step()
        return loss.float()

    @torch.no_grad()
    def capture(
        self,
        batch: Any,
        objective: Callable[[Any], Tensor] | LogitsLoss,
        positions: Tensor | list[Tensor] | None = None,
    ) -> CapturedStep:
        """A step as one CUDA graph: ``run = opt.capture(batch, objective)``, ``loss = run(batch)``.

        Bit for bit what ``step(batch, objective)`` does, without waiting for the device. Capturing
        makes no step. Arguments, errors, what may change: ``subzero.capture.CapturedStep``.
        """
        return CapturedStep(self, batch, objective, positions)

    @torch.no_grad()
    def bases_from(
        self,
        batches: Any,
        objective: Callable[[Any], Tensor] | LogitsLoss,
        positions: Tensor | list[Tensor] | None = None,
    ) -> None:
        """Bases V from the rows of plain forwards, before the first step; draws no noise.

        For forms core and right of activation noise; 64 examples serve. Without it the first
        step's own rows give V. Arguments as in ``step``.

        Raises:
            ValueError: weight noise, or a step has been made.
        """
        if not self.options.activation or self.steps:
            got = f"step {self.steps}" if self.options.activation else "noise='weight'"
            raise ValueError(
                f"bases_from: expected noise='activation' and a call before the first step, got "
                f"{got}; bases of later windows come from the rows of the run itself"
            )
        assert isinstance(self._weights, ActivationWeights)
        micros = self._queries.bind(batches, objective, positions)
        with eval_mode(self.model), self._weights.forgetting():
            self._weights.begin_step()
            for micro in micros:
                self._queries.clean_rows(micro, objective, self._rng)
            self._weights.align_kept(self.window)

    def evaluate_whole_groups(self, why: str) -> None:
        """From now on every query runs the whole batch, also where it could cost a row.

        For comparisons; ``plan()`` shows ``why``. Activation noise only.
        """
        if not self.options.activation:
            raise ValueError("evaluate_whole_groups: expected noise='activation', got 'weight'")
        self._queries.evaluate_whole_groups(why)

    def export_lora(self, folder: str | os.PathLike[str]) -> None:
        """The current window as a PEFT LoRA adapter: form right of activation noise.

        ``peft`` loads it over the model as it was folded at the window's start, with the same
        logits: lora_B = B, lora_A = V^T, scale 1. The weights are not folded by this call.
        The folder is written beside and renamed.

        Raises:
            ValueError: another form or noise, no step yet, a model that carries an adapter.
            OSError: the folder could not be written; what was there is as before.
        """
        export_lora(self, Path(folder))

    def fold(self) -> None:
        """Write W + U S V^T into the weights, in place and in one pass; afterwards S = 0.

        Bases, rule state and counters stay, and so does the loss, up to the rounding of the store.
        """
        if self._recorder and self._weights.changed:
            self._recorder.event(fold=self.steps)
        self._weights.fold()

    def detach(self) -> None:
        """Fold, and remove the side path: the model is a plain model again."""
        self.fold()
        self._weights.detach()
        self.stop_recording()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Folds, then everything a bit-exact resume needs: tensors, numbers and strings only."""
        self.fold()
        return state.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Resume bit for bit; the model must hold the weights saved with this state.

        Raises:
            ValueError: a state of another model, rank, seed, rule or contract version.
        """
        if self._recorder:
            raise ValueError(
                "state_dict: expected an optimizer that does not record, got one that does; call "
                "stop_recording() first"
            )
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

    # Nothing here reads from the device where a captured graph may hold it: weights, losses and
    # counters stay there, and a step that is skipped is masked.

    def _read_group(self) -> None:
        options.check_group(self.param_groups[0])
        if self._recorder:
            self._recorder.group(self)
        self._numbers.follow(self.param_groups[0])

    def _count(self, finite: Tensor) -> None:
        self._skipped += ~finite
        self._rng[1:].add_(self.options.queries)

    def _bind(
        self, batch: Any, objective: Any, positions: Any, sizes: Any = None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Check what the user passed, before anything is touched; the call gives loss, finite.

        ``sizes``: what a LogitsLoss reads at most, where the device must not be read to find out.
        """
        if self.options.activation:
            micros = self._queries.bind(batch, objective, positions, sizes)
            return lambda: self._activation_step(micros, objective)
        evaluate = self._evaluator.bind(batch, objective, positions, sizes)
        return lambda: self._weight_step(evaluate)

    def _weight_step(self, evaluate: Callable[[Signs], Tensor]) -> tuple[Tensor, Tensor]:
        assert isinstance(self._weights, Weights)
        opts, eps = self.options, self._numbers.hyper.eps
        with eval_mode(self.model), self._weights.perturbed(eps, self._rng) as signs:
            losses = evaluate(signs)
            if self._rehearsing:
                losses = losses * math.nan
            rho, finite = directional(losses, eps, opts.two_sided, opts.rule)
            if self._recorder:
                self._recorder.take(rho, finite, self._numbers.hyper.lr, self._rng)
            self._update(rho / opts.queries, finite)
        return losses.mean() if opts.two_sided else losses[0], finite

    def _activation_step(self, micros: list[Micro], objective: Any) -> tuple[Tensor, Tensor]:
        weights = self._weights
        assert isinstance(weights, ActivationWeights)
        with eval_mode(self.model), weights.forgetting():
            weights.begin_step()
            outcome = self._queries.evaluate(micros, objective, self._numbers.hyper.eps, self._rng)
            if self._rehearsing:
                outcome = outcome.skipped()
            weights.end_evaluation(outcome.finite, self.window)
            self._update(
                weights.space.set_rows(outcome.weight, outcome.ids, outcome.finite), outcome.finite
            )
            weights.end_step()
        return outcome.loss, outcome.finite

    def _open_window(self) -> None:
        window, rest = divmod(self.steps, self.options.refresh_every)
        if rest or window == self.window:
            return
        self.fold()
        if self._recorder:
            self._recorder.event(window=window)
        self._weights.open_window(window, self._rule_state)
        self.window = window

    def _update(self, weight: Tensor, finite: Tensor) -> None:
        hyper, rule = self._numbers.hyper, RULES[self.options.rule]
        # a graph holds the decay, whatever it is: but where it is made anew for another
        held = self._capturing and self.options.form != "full"
        if self._numbers.decays or held:
            factor = 1 - hyper.lr * hyper.weight_decay
            self._weights.decay_(where(finite, factor, 1.0, torch.float64))
        for name, space in self._weights.spaces():
            rule(space, self._rule_state[name], weight, finite, self._rng, hyper)

    def _redo(self, rho: Tensor, finite: Tensor, last: bool) -> None:
        """A step of a trajectory: what ``_weight_step`` does once rho is known."""
        assert isinstance(self._weights, Weights)
        self._read_group()
        self._open_window()
        self._update(rho / self.options.queries, finite)
        self._weights.updated(self._rng, show=last)
        self._count(finite)
        self.steps += 1

    def _fold_first(self, *_: Any) -> None:
        self.fold()

    def _after_load(self, module: nn.Module, *_: Any) -> None:
        self._weights.reread(module)
        if self._recorder:
            self._recorder.loaded(self.steps)
            self._recorder = None
