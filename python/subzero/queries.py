"""One step of activation noise: clean losses, queries, and what weighs each row's noise.

    w[k, b] = (l[k, b] - l_b) / s

s is eps for rules sgd and momentum, else the spread of all differences of the step. The estimate
of a gradient is the mean over queries and examples (tokens) of w z (x / |x|)^T, so what a space
gets is w / (K examples) for each row, or w / (K scored tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .activation import NoisyRows, Pass
from .activation_weights import ActivationWeights
from .groups import SharedPrefix, batch_size, repeat_batch
from .losses import micro_masks
from .objectives import LogitsLoss, logits_at
from .options import Options
from .row_queries import RowDecoder, differs, why_whole_groups
from .rows import (
    Grid,
    check_positions,
    compact,
    encoder_grid,
    main_grid,
    make_grid,
    readable,
    require_scored,
    scored_positions,
    take,
    with_decoder_tokens,
)

SPREAD_RULES = ("norm", "muon", "adam")


@dataclass
class Micro:
    """One micro-batch, its rows and, once evaluated, its losses.

    clean (B,) or (B, P), differences (K, B) or (K, B, P): losses less the clean ones; with P the
    entries that are not ``valid`` are zero.
    """

    batch: Any
    examples: int
    grid: Grid
    noisy: Tensor
    encoder: Grid | None
    scored: Tensor | None
    index: Tensor
    valid: Tensor
    clean: Tensor = field(init=False, repr=False)
    differences: Tensor = field(init=False, repr=False)

    @property
    def by_token(self) -> bool:
        return self.clean.dim() == 2

    @property
    def reads(self) -> Tensor:
        """Where losses are read, (B, T) bool; in its order ``valid`` entries follow one another."""
        return self.grid.real if self.scored is None else self.scored

    def axes(self) -> dict[str, NoisyRows]:
        """The noisy rows of a whole group on each token axis."""
        axes = {"main": _rows(self.grid, self.noisy)}
        if self.encoder is not None:
            axes["encoder"] = _rows(self.encoder, self.encoder.real)
        return axes


@dataclass
class Outcome:
    """A step's result: the clean loss, whether every loss was finite, and each row's weight.

    weight (K, rows) and ids (rows,) by axis, micro-batches one after another.
    """

    loss: Tensor
    finite: Tensor
    weight: dict[str, Tensor]
    ids: dict[str, Tensor]


class ActivationEvaluator:
    """Evaluates a step's clean losses and queries, whole groups or rows."""

    def __init__(self, model: nn.Module, weights: ActivationWeights, options: Options) -> None:
        self.model = model
        self.plan = plan = weights.plan
        self.path = weights.side
        self.options = options
        noisy = {id(e.param) for e in plan.entries if e.noisy}
        self.shared = SharedPrefix(model, noisy, weights.hooks)
        plan.shared[:] = self.shared.names
        plan.whole_groups = why_whole_groups(model, plan, options.where)
        self._decoder = None if plan.whole_groups else RowDecoder(model, plan)
        self._checked: set[bool] = set()

    def evaluate_whole_groups(self, why: str) -> None:
        """No query costs a row any more."""
        self.plan.whole_groups = why
        self._decoder = None

    def bind(self, batch: Any, objective: Any, positions: Any) -> list[Micro]:
        """Check what the user passed, before anything is touched."""
        if objective is None:
            raise TypeError(
                "objective: expected step(batch, objective) with noise='activation', got a "
                "closure; pass a batch and an objective that gives one loss per example or token"
            )
        if not callable(objective):
            raise TypeError(f"objective: expected a callable, got {type(objective).__name__}")
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise ValueError("batch: expected at least one micro-batch, got an empty list")
        masks = micro_masks(positions, len(batches))
        micros, first = [], 0
        for some, mask in zip(batches, masks, strict=True):
            micros.append(self._micro(some, objective, mask, first))
            first += micros[-1].grid.sequences
        return micros

    def _micro(self, batch: Any, objective: Any, positions: Any, first: int) -> Micro:
        examples = batch_size(batch)
        if isinstance(objective, LogitsLoss):
            batch = objective.prepare(self.model, batch)
        named = with_decoder_tokens(self.model, batch)
        grid = main_grid(named, examples, first)
        if isinstance(objective, LogitsLoss):
            scored: Tensor | None = objective.scored(batch, positions)
        else:
            scored = scored_positions(named, examples, grid, positions)
        if scored is None and self.options.where == "loss":
            raise ValueError(
                "positions: expected a mask of the tokens the loss reads, or labels for them, with "
                "where='loss', got neither; pass step(batch, objective, positions=mask), or "
                "where='all'"
            )
        if grid is None:
            tokens = 1 if scored is None else check_positions(scored, examples, None).shape[1]
            grid = make_grid(examples, tokens, self.path.device, first=first)
        noisy = grid.real if self.options.where == "all" else scored
        assert noisy is not None
        if scored is not None and not readable(scored):
            require_scored(scored)
        index, valid = compact(grid.real if scored is None else scored)
        source = encoder_grid(named, examples, first) if self.options.where == "all" else None
        return Micro(batch, examples, grid, noisy, source, scored, index, valid)

    def evaluate(
        self, micros: list[Micro], objective: Any, eps: float | Tensor, rng: Tensor
    ) -> Outcome:
        """All losses of the step; the taps keep the clean rows."""
        for micro in micros:
            if self._serves_rows(micro, objective):
                self._row_queries(micro, objective, eps, rng)
            else:
                self._whole_groups(micro, objective, eps, rng)
        kinds = {micro.by_token for micro in micros}
        if len(kinds) > 1:
            raise ValueError("objective: expected losses of one kind, got some per token")
        return self._weigh(micros, eps)

    def clean_rows(self, micro: Micro, objective: Any, rng: Tensor) -> None:
        """A plain forward during which the taps keep their rows, whole: no V projects them."""
        none = torch.zeros(0, dtype=torch.int64, device=rng.device)
        taps = list(self.path.taps.values())
        bases = [tap.basis for tap in taps]
        for tap in taps:
            tap.basis = None
        self.path.begin(Pass(1, True, none, micro.axes(), 0.0, rng))
        try:
            self._losses(micro, objective, 1)
        finally:
            self.path.begin(None)
            for tap, basis in zip(taps, bases, strict=True):
                tap.basis = basis

    # whole groups

    def _whole_groups(self, micro: Micro, objective: Any, eps: float | Tensor, rng: Tensor) -> None:
        queries = self.options.queries
        groups = queries + 1
        every = torch.arange(queries, device=rng.device)
        self.path.begin(Pass(groups, True, every, micro.axes(), eps, rng))
        self.shared.groups, self.shared.rows = groups, groups * micro.examples
        try:
            losses = self._losses(micro, objective, groups)
        finally:
            self.path.begin(None)
            self.shared.groups = self.shared.rows = 1
        self._settle(micro, losses[0], losses[1:])

    def _losses(self, micro: Micro, objective: Any, groups: int) -> Tensor:
        """(groups, B) or, at the scored positions, (groups, B, P)."""
        batch = repeat_batch(micro.batch, groups)
        if isinstance(objective, LogitsLoss):
            assert micro.scored is not None
            losses = objective.at(
                self.model, batch, micro.index.repeat(groups, 1), micro.valid.repeat(groups, 1)
            )
            return self._shaped(losses, micro, groups, micro.index.shape[1], "scored positions")
        losses = objective(batch)
        shaped = self._shaped(losses, micro, groups, micro.grid.real.shape[1], "tokens")
        if shaped.dim() == 3:
            shaped = take(shaped.flatten(0, 1), micro.index.repeat(groups, 1)).unflatten(
                0, (groups, micro.examples)
            )
        return shaped

    def _shaped(self, losses: Any, micro: Micro, groups: int, width: int, unit: str) -> Tensor:
        rows = groups * micro.examples
        if not isinstance(losses, Tensor) or tuple(losses.shape) not in ((rows,), (rows, width)):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"objective: expected one loss per example, shape ({rows},), or per token, shape "
                f'({rows}, {width}) for {width} {unit}, got {got}; use reduction="none"'
            )
        wide = torch.promote_types(losses.dtype, torch.float32)
        return losses.detach().to(self.path.device, wide).unflatten(0, (groups, micro.examples))

    def _settle(self, micro: Micro, clean: Tensor, noisy: Tensor) -> None:
        if clean.dim() == 2:
            clean = clean.masked_fill(~micro.valid, 0)
            noisy = noisy.masked_fill(~micro.valid, 0)
        micro.clean, micro.differences = clean, noisy - clean

    # queries that cost a row

    def _serves_rows(self, micro: Micro, objective: Any) -> bool:
        return (
            self._decoder is not None
            and isinstance(objective, LogitsLoss)
            and isinstance(micro.batch, Mapping)
            and "input_ids" in micro.batch
            and micro.grid.sequences == micro.examples  # packed rows need a mask of their own
        )

    def _row_queries(
        self, micro: Micro, objective: LogitsLoss, eps: float | Tensor, rng: Tensor
    ) -> None:
        decoder = self._decoder
        assert decoder is not None and micro.scored is not None
        none = torch.zeros(0, dtype=torch.int64, device=rng.device)
        axes = micro.axes()
        self.path.begin(Pass(1, True, none, axes, eps, rng))
        try:
            with decoder.recording(micro.grid, micro.scored) as extra:
                logits = logits_at(
                    self.model, micro.batch, micro.index,
                    objective.token_ids(micro.index.device), **extra,
                )  # fmt: skip
            if self._reproduces(micro, objective, logits, eps, rng):
                clean = self._shaped(
                    objective.losses(logits, micro.batch, micro.index), micro, 1,
                    micro.index.shape[1], "scored positions",
                )[0]  # fmt: skip
                rows = NoisyRows(decoder.rows, decoder.index(micro.scored), axes["main"].ids)
                size, parts = decoder.chunk(), []
                for start in range(0, self.options.queries, size):
                    chunk = torch.arange(
                        start, min(start + size, self.options.queries), device=rng.device
                    )
                    self.path.begin(Pass(len(chunk), False, chunk, {"main": rows}, eps, rng))
                    parts.append(self._decode(micro, objective, len(chunk)))
                self._settle(micro, clean, torch.cat(parts))
                return
        finally:
            self.path.begin(None)
            decoder.forget()
        for tap in self.path.taps.values():  # the rows of the forward that did not serve
            tap.drop_last()
        self._whole_groups(micro, objective, eps, rng)

    def _decode(self, micro: Micro, objective: LogitsLoss, queries: int) -> Tensor:
        """Losses of some queries, (queries, B) or (queries, B, P)."""
        logits = self._decoded_logits(micro, objective, queries)
        losses = objective.losses(
            logits, repeat_batch(micro.batch, queries), micro.index.repeat(queries, 1)
        )
        return self._shaped(losses, micro, queries, micro.index.shape[1], "scored positions")

    def _decoded_logits(self, micro: Micro, objective: LogitsLoss, queries: int) -> Tensor:
        decoder = self._decoder
        assert decoder is not None
        index = decoder.within(micro.index).repeat(queries, 1)
        with decoder.decoding(queries):
            inputs = decoder.inputs(micro.batch, queries)
            return logits_at(self.model, inputs, index, objective.token_ids(index.device))

    def _reproduces(
        self, micro: Micro, objective: LogitsLoss, clean: Tensor, eps: float | Tensor, rng: Tensor
    ) -> bool:
        """Whether rows decoded without noise give the clean logits; tried once, and with padding.

        If not, the plan says so and this and all later steps evaluate whole groups.
        """
        padded = not bool(micro.grid.real.all()) if len(self._checked) < 2 else True
        if padded in self._checked or len(self._checked) == 2:
            return True
        if not bool(torch.isfinite(clean[micro.valid]).all()):
            return True  # nothing to compare with, and the step will be skipped
        none = torch.zeros(0, dtype=torch.int64, device=rng.device)
        rows = NoisyRows(self._decoder.rows, none, none)  # type: ignore[union-attr]
        self.path.begin(Pass(1, False, none, {"main": rows}, eps, rng))
        try:
            reason = differs(self._decoded_logits(micro, objective, 1), clean, micro.valid)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError,
        ) as error:  # fmt: skip
            reason = f"decoding on its cache failed: {type(error).__name__}: {error}"
        self._checked.add(padded)
        if reason:
            self.evaluate_whole_groups(reason)
        return not reason

    # from losses to weights

    def _weigh(self, micros: list[Micro], eps: float | Tensor) -> Outcome:
        """The weight of every noisy row: its difference over s, and over what is averaged."""
        queries = self.options.queries
        if micros[0].by_token:
            count = sum(int(m.valid.sum()) for m in micros)
            clean = torch.cat([m.clean[m.valid] for m in micros])
            credit = [self._later_tokens(m) for m in micros]
            spread = torch.cat(
                [c[:, m.reads] for c, m in zip(credit, micros, strict=True)], 1
            ).square().mean().sqrt()  # fmt: skip
            main = [c[:, m.noisy] for c, m in zip(credit, micros, strict=True)]
            whole = [m.differences.sum(2) for m in micros]
        else:
            count = sum(m.examples for m in micros)
            clean = torch.cat([m.clean for m in micros])
            whole = [m.differences for m in micros]
            if self.options.rule in SPREAD_RULES and queries * count == 1:
                raise ValueError(
                    f"queries: expected at least two differences a step with rule="
                    f"{self.options.rule!r}, which divides by their spread, got one query of one "
                    "example; raise queries or the batch, or take rule='sgd'"
                )
            spread = torch.cat(whole, 1).std() if queries * count > 1 else clean.new_ones(())
            main = [w[:, m.noisy.nonzero()[:, 0]] for w, m in zip(whole, micros, strict=True)]
        scale = spread.clamp_min(1e-12) if self.options.rule in SPREAD_RULES else eps
        differences = torch.cat([m.differences.flatten() for m in micros])
        finite = torch.isfinite(clean).all() & torch.isfinite(differences).all()
        weight = {"main": torch.cat(main, 1)}
        ids = {"main": torch.cat([m.grid.ids[m.noisy] for m in micros])}
        sources = [(w, m.encoder) for w, m in zip(whole, micros, strict=True) if m.encoder]
        if sources:
            parts = [w[:, source.real.nonzero()[:, 0]] for w, source in sources]
            weight["encoder"] = torch.cat(parts, 1)
            ids["encoder"] = torch.cat([source.ids[source.real] for _, source in sources])
        for axis, some in weight.items():
            some = some / scale / (queries * count)
            weight[axis] = torch.where(finite, some, torch.zeros_like(some))
        return Outcome(clean.mean(), finite, weight, ids)

    def _later_tokens(self, micro: Micro) -> Tensor:
        """(K, B, T): each token's difference plus discount^distance times those of later tokens.

        A discount above 0 takes a few temporary tensors (B, T, T), one weight for each pair.
        """
        grid, discount = micro.grid, self.options.discount
        full = micro.differences.new_zeros(len(micro.differences), *grid.real.shape)
        full[:, micro.reads] = micro.differences[:, micro.valid]
        if discount == 0:
            return full
        position = grid.position.to(full.dtype)
        distance = position[:, None, :] - position[:, :, None]  # (B, t, s)
        same = grid.example[:, None, :] == grid.example[:, :, None]
        reached = same & (distance >= 0) & grid.real[:, None, :] & grid.real[:, :, None]
        decay = torch.where(reached, discount**distance, 0.0)
        return torch.einsum("kbs,bts->kbt", full, decay)


def _rows(grid: Grid, noisy: Tensor) -> NoisyRows:
    index = noisy.flatten().nonzero()[:, 0]
    return NoisyRows(noisy.numel(), index, grid.ids.flatten()[index])
