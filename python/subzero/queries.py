"""One step of activation noise: the clean losses and those of the queries, whole groups or rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activation import Pass
from .activation_weights import ActivationWeights
from .groups import SharedPrefix, batch_size, repeat_batch
from .heads import logits_at
from .hooks import eval_mode
from .losses import micro_masks
from .micros import Extent, Micro, reading, serves_rows
from .objectives import LogitsLoss
from .options import Options
from .row_queries import RowDecoder, differs, why_whole_groups
from .row_weights import Outcome, weigh
from .rows import (
    check_positions,
    encoder_grid,
    main_grid,
    make_grid,
    scored_positions,
    with_decoder_tokens,
)


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
        self._tried: set[bool] = set()

    @property
    def decodes(self) -> bool:
        """Whether queries cost a row where the batch and the objective allow it."""
        return self._decoder is not None

    def evaluate_whole_groups(self, why: str) -> None:
        """No query costs a row any more."""
        self.plan.whole_groups = why
        self._decoder = None

    def bind(
        self,
        batch: Any,
        objective: Any,
        positions: Any,
        extents: Sequence[Extent | None] | None = None,
    ) -> list[Micro]:
        """Check what the user passed, before anything is touched.

        Args:
            extents: of each micro-batch, if they are not to be read from the device. A step whose
                batch has more positions is skipped.
        """
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
        known = [None] * len(batches) if extents is None else extents
        micros: list[Micro] = []
        first: int | Tensor = 0
        for some, mask, extent in zip(batches, masks, known, strict=True):
            micros.append(self._micro(some, objective, mask, first, extent))
            first = micros[-1].grid.next
        return micros

    def _micro(
        self,
        batch: Any,
        objective: Any,
        positions: Any,
        first: int | Tensor = 0,
        known: Extent | None = None,
    ) -> Micro:
        examples = batch_size(batch)
        if isinstance(objective, LogitsLoss):
            batch = objective.prepare(self.model, batch)
        named = with_decoder_tokens(self.model, batch)
        grid = main_grid(named, examples, first)
        if isinstance(objective, LogitsLoss):
            scored: Tensor | None = objective.scored(batch, positions)
        else:
            real = None if grid is None else grid.real
            scored = scored_positions(named, examples, real, positions)
        everywhere = self.options.where == "all"
        if scored is None and not everywhere:
            raise ValueError(
                "positions: expected a mask of the tokens the loss reads, or labels for them, with "
                "where='loss', got neither; pass step(batch, objective, positions=mask), or "
                "where='all'"
            )
        if grid is None:
            tokens = 1 if scored is None else check_positions(scored, examples, None).shape[1]
            grid = make_grid(examples, tokens, self.path.device, first=first)
        source = encoder_grid(named, examples, first) if everywhere else None
        valid = grid.real if scored is None else scored
        if not isinstance(objective, LogitsLoss):
            return Micro(batch, examples, grid, everywhere, source, None, valid)
        read = reading(objective, valid, positions, grid, known)
        return Micro(batch, examples, grid, everywhere, source, *read)

    def prepare(self, batch: Any, objective: Any, positions: Any) -> None:
        """Before a capture, which cannot: find out whether queries may cost a row."""
        micros = self.bind(batch, objective, positions)
        with eval_mode(self.model):
            for micro in micros:
                self.try_rows(micro, objective)

    def evaluate(
        self, micros: list[Micro], objective: Any, eps: float | Tensor, rng: Tensor
    ) -> Outcome:
        """All losses of the step; the taps keep the clean rows."""
        for micro in micros:
            if micro.fits is None:
                self.try_rows(micro, objective)
            if self._serves_rows(micro):
                self._row_queries(micro, objective, eps, rng)
            else:
                self._whole_groups(micro, objective, eps, rng)
        kinds = {micro.by_token for micro in micros}
        if len(kinds) > 1:
            raise ValueError("objective: expected losses of one kind, got some per token")
        return self._weigh(micros, eps)

    def _weigh(self, micros: list[Micro], eps: float | Tensor) -> Outcome:
        return weigh(micros, eps, self.options)

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
            self.path.settle()
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
            self.path.settle()
        finally:
            self.path.begin(None)
            self.shared.groups = self.shared.rows = 1
        self._settle(micro, losses[0], losses[1:])

    def _losses(self, micro: Micro, objective: Any, groups: int) -> Tensor:
        """(groups, B) or, at the scored positions, (groups, B, P)."""
        batch = repeat_batch(micro.batch, groups)
        if isinstance(objective, LogitsLoss):
            assert micro.index is not None
            losses = objective.at(
                self.model, batch, micro.index.repeat(groups, 1), micro.valid.repeat(groups, 1)
            )
            return self._shaped(losses, micro, groups, micro.index.shape[1], "scored positions")
        return self._shaped(objective(batch), micro, groups, micro.grid.real.shape[1], "tokens")

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
            clean = torch.where(micro.valid, clean, 0.0)
            noisy = torch.where(micro.valid, noisy, 0.0)
        micro.clean, micro.differences = clean, noisy - clean

    # queries that cost a row

    def _serves_rows(self, micro: Micro) -> bool:
        return self._decoder is not None and serves_rows(micro)

    def _row_queries(
        self, micro: Micro, objective: LogitsLoss, eps: float | Tensor, rng: Tensor
    ) -> None:
        decoder = self._decoder
        assert decoder is not None and micro.index is not None
        none = torch.zeros(0, dtype=torch.int64, device=rng.device)
        width = micro.index.shape[1]
        self.path.begin(Pass(1, True, none, micro.axes(), eps, rng))
        try:
            logits = self._recorded(micro, objective)
            self.path.settle()
            losses = objective.losses(logits, micro.batch, micro.index)
            clean = self._shaped(losses, micro, 1, width, "scored positions")[0]
            rows, parts, size = decoder.noisy_rows(micro), [], decoder.chunk()
            for start in range(0, self.options.queries, size):
                stop = min(start + size, self.options.queries)
                chunk = torch.arange(start, stop, device=rng.device)
                self.path.begin(Pass(len(chunk), False, chunk, {"main": rows}, eps, rng))
                self.path.prepare()
                parts.append(self._decode(micro, objective, len(chunk)))
            self._settle(micro, clean, parts[0] if len(parts) == 1 else torch.cat(parts))
        finally:
            self.path.begin(None)
            decoder.forget()

    def _recorded(self, micro: Micro, objective: LogitsLoss) -> Tensor:
        """The clean logits at the scored positions; the decoder keeps what queries need."""
        assert self._decoder is not None and micro.index is not None
        words = objective.token_ids(micro.index.device)
        with self._decoder.recording(micro) as extra:
            return logits_at(self.model, micro.batch, micro.index, words, **extra)

    def _decode(self, micro: Micro, objective: LogitsLoss, queries: int) -> Tensor:
        """Losses of some queries, (queries, B) or (queries, B, P)."""
        logits = self._decoded_logits(micro, objective, queries)
        assert micro.index is not None
        losses = objective.losses(
            logits, repeat_batch(micro.batch, queries), micro.index.repeat(queries, 1)
        )
        return self._shaped(losses, micro, queries, micro.index.shape[1], "scored positions")

    def _decoded_logits(self, micro: Micro, objective: LogitsLoss, queries: int) -> Tensor:
        decoder = self._decoder
        assert decoder is not None and micro.index is not None
        index = decoder.within(micro.index).repeat(queries, 1)
        with decoder.decoding(queries):
            inputs = decoder.inputs(micro.batch, queries)
            return logits_at(self.model, inputs, index, objective.token_ids(index.device))

    # whether they may

    def try_rows(self, micro: Micro, objective: Any) -> None:
        """Compare rows decoded without noise with the clean logits, before they are relied on.

        Tried once for batches with a mask and once for those without, on the batch as it is and,
        if it has a mask, with one token less of its longest sequence. If they differ the plan says
        so, and this and all later steps evaluate whole groups. It waits for the device.
        """
        if not self._serves_rows(micro) or ("attention_mask" in micro.batch) in self._tried:
            return
        compared = False
        for some in (micro, self._shorter(micro, objective)):
            if some is None:
                continue
            clean = self._recorded(some, objective)
            if not bool(torch.isfinite(clean[some.valid]).all()):
                continue  # nothing to compare with, and the step will be skipped
            compared = True
            try:
                reason = differs(self._decoded_logits(some, objective, 1), clean, some.valid)
            except torch.OutOfMemoryError:
                raise
            except (
                RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError,
            ) as error:  # fmt: skip
                reason = f"decoding on its cache failed: {type(error).__name__}: {error}"
            if reason:
                self.evaluate_whole_groups(reason)
                return
        assert self._decoder is not None
        self._decoder.forget()
        if compared:
            self._tried.add("attention_mask" in micro.batch)

    def _shorter(self, micro: Micro, objective: LogitsLoss) -> Micro | None:
        """The same batch with the first token of its longest sequence as padding."""
        mask = micro.batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != micro.grid.real.shape:
            return None
        row = int(mask.sum(1).argmax())
        token = int(mask[row].to(torch.int8).argmax())
        if int(mask[row].sum()) < 2 or int(micro.valid.sum()) < 2:
            return None
        mask = mask.clone()
        mask[row, token] = 0
        scored = torch.zeros_like(micro.grid.real)
        assert micro.index is not None
        scored.scatter_(1, micro.index, micro.valid)
        scored[row, token] = False
        return self._micro({**micro.batch, "attention_mask": mask}, _at(objective), scored)


def _at(objective: LogitsLoss) -> LogitsLoss:
    """Its logits at positions of a call's own, whatever they are for the objective."""
    return LogitsLoss(objective.fn, tokens=objective.tokens)
