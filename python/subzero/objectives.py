"""Objectives that read logits at chosen positions, so that no other logits are formed.

A :class:`LogitsLoss` serves wherever ``SubZero.step(batch, objective)`` takes one. Because the
optimizer calls the model itself, it can evaluate a query as one decoded row (row_queries.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import batch_size
from .heads import at_least_fp32, forward_names, hidden_at, logits_at, next_token_losses
from .rows import (
    compact,
    labelled_positions,
    last_positions,
    next_positions,
    readable,
    real_tokens,
    scored_positions,
    sequence_ends,
    take,
    token_labels,
)


class LogitsLoss:
    """A loss that is a function of the logits at a few positions.

    Args:
        fn: ``fn(logits, batch)`` with logits (examples, P, vocabulary) at the scored positions of
            each example, in order and from the left, P the largest number of an example -> losses
            (examples,), or (examples, P) of which entries beyond an example's own are ignored.
        positions: which positions are read: ``positions(batch)`` -> bool (examples, tokens), or
            such a mask. None: what ``step`` is given, else the positions before labels other than
            -100.
        tokens: ids of the vocabulary that fn reads; logits are then (examples, P, len(tokens)).
        width: P, where ``positions`` marks as many in every batch: then it need not be read from
            the device.

    A batch is a mapping; what the model's forward knows by name is passed to it, labels are not.
    """

    def __init__(
        self,
        fn: Callable[[Tensor, Any], Tensor],
        positions: Callable[[Any], Tensor] | Tensor | None = None,
        *,
        tokens: Sequence[int] | None = None,
        width: int | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(
                f"fn: expected a callable fn(logits, batch) -> losses, got {type(fn).__name__}"
            )
        self.fn = fn
        self.positions = positions
        self.tokens = None if tokens is None else list(tokens)
        self.width = width
        self._token_ids: dict[torch.device, Tensor] = {}

    def token_ids(self, device: torch.device) -> Tensor | None:
        """``tokens`` on a device, int64, copied there once."""
        if self.tokens is None:
            return None
        if device not in self._token_ids:
            if device.type == "cuda":  # from pinned memory, where nothing waits for the copy
                pinned = torch.tensor(self.tokens, pin_memory=True)
                self._token_ids[device] = pinned.to(device, non_blocking=True)
            else:
                self._token_ids[device] = torch.tensor(self.tokens, device=device)
        return self._token_ids[device]

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        """The batch as the model takes it: an encoder-decoder's labels shifted into its input."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batch: expected a mapping of tensors with a LogitsLoss, got "
                f'{type(batch).__name__}; pass for example {{"input_ids": ids}}'
            )
        config = getattr(model, "config", None)
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
            if shift is None or not isinstance(batch.get("labels"), Tensor):
                raise ValueError(
                    "batch: expected decoder_input_ids or labels for an encoder-decoder, got "
                    f"{sorted(batch)}; add one of them"
                )
            if batch["labels"].dim() != 2:
                raise ValueError(
                    "labels: expected (examples, tokens) for an encoder-decoder, whose input they "
                    f"become, got shape {tuple(batch['labels'].shape)}; give class labels beside "
                    "decoder_input_ids"
                )
            return {**batch, "decoder_input_ids": shift(labels=batch["labels"])}
        return batch

    def scored(self, batch: Any, positions: Tensor | None = None) -> Tensor:
        """The mask of positions read, bool (examples, tokens)."""
        examples = batch_size(batch)
        chosen = self.positions if positions is None else positions
        mask = scored_positions(batch, examples, real_tokens(batch, examples), chosen)
        if mask is None:
            raise ValueError(
                "positions: expected a mask or labels of the tokens with a LogitsLoss that names "
                "no positions, got neither; pass step(batch, objective, positions=mask)"
            )
        return mask

    def __call__(self, model: nn.Module, batch: Any, positions: Tensor | None = None) -> Tensor:
        """Losses (examples,), or (examples, P) with zeros beyond an example's own."""
        batch = self.prepare(model, batch)
        index, valid = self.read(self.scored(batch, positions), positions)
        return self.at(model, batch, index, valid)

    def read(
        self, mask: Tensor, positions: Tensor | None, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Index and valid entries (examples, P) of the mask that ``scored`` gave for ``positions``.

        P is ``width`` if given, else as many as a row has at most, which is read from the device
        unless the loss names it; positions of a call's own may be more than those.
        """
        return compact(mask, self.width if width is None and positions is None else width)

    def at(self, model: nn.Module, batch: Any, index: Tensor, valid: Tensor) -> Tensor:
        """Losses of a prepared batch at index (examples, P), zeros where entries are not valid."""
        logits = logits_at(model, batch, index, self.token_ids(index.device))
        losses = self.losses(logits, batch, index)
        return torch.where(valid, losses, 0.0) if losses.shape == valid.shape else losses

    def losses(self, logits: Tensor, batch: Any, index: Tensor) -> Tensor:
        """fn's losses of logits at ``index`` (examples, P), the positions of this call."""
        return self.fn(logits, batch)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits at the scored positions, (examples, P, vocabulary or tokens)."""
        batch = self.prepare(model, batch)
        index, _ = self.read(self.scored(batch), None)
        return logits_at(model, batch, index, self.token_ids(index.device))


def label_words(ids: Sequence[int], packed: int | None = None) -> LogitsLoss:
    """Cross entropy over the label words at the last real position of each example.

        loss_b = -log softmax(logits_b[ids])[labels_b]

    A batch holds input_ids (examples, tokens), attention_mask if there is padding, on either side,
    and labels (examples,): the class of each example, an index into ``ids``. Source: MeZO, arXiv
    2305.17333, appendix E.2. Losses are (examples,), fp32 or wider.

    Args:
        packed: how many examples lie behind each other in a row of the batch, as ``pack`` makes
            it; labels and losses are then (rows, packed).
    """
    if packed is not None:
        return _PackedWords(ids, packed)

    def loss(logits: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(at_least_fp32(logits[:, 0]), batch["labels"], reduction="none")

    return LogitsLoss(loss, last_positions, tokens=ids, width=1)


class _PackedWords(LogitsLoss):
    def __init__(self, ids: Sequence[int], count: int) -> None:
        ends = functools.partial(sequence_ends, count=count)
        super().__init__(self._cross_entropy, ends, tokens=ids, width=count)

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        kind = getattr(getattr(model, "config", None), "model_type", "")
        mask = batch.get("attention_mask")
        if kind in MASKED_BY_HAND and (mask is None or mask.dim() != 4):
            raise ValueError(
                f"batch: expected an attention mask (1, 1, tokens, tokens) for {kind}, which does "
                "not tell packed sequences apart by their position ids, got "
                f"{None if mask is None else tuple(mask.shape)}; pack(batch, mask=model.dtype)"
            )
        if "position_ids" not in forward_names(model):
            raise ValueError(
                f"model: expected one that takes position_ids for packed sequences, got "
                f"{type(model).__name__}; pad the batch instead"
            )
        return super().prepare(model, batch)

    @staticmethod
    def _cross_entropy(logits: Tensor, batch: Any) -> Tensor:
        logits = at_least_fp32(logits).transpose(1, 2)
        return F.cross_entropy(logits, batch["labels"], reduction="none")


# Causal models of transformers 5 that make their mask without looking at position ids.
MASKED_BY_HAND = frozenset(
    {
        "bart", "biogpt", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "electra",
        "ernie", "falcon", "marian", "mbart", "mvp", "opt", "pegasus", "plbart", "roberta",
        "roberta-prelayernorm", "roc_bert", "trocr", "xglm", "xlm-roberta", "xlm-roberta-xl",
        "xmod",
    }
)  # fmt: skip


def label_logits(model: nn.Module, batch: Any, tokens: Sequence[int] | None = None) -> Tensor:
    """Logits in fp32 where the labels are, and no others: for losses of one's own in a closure.

        logits = label_logits(model, batch, words)[:, 0]
        loss = F.cross_entropy(logits, batch["labels"])

    Args:
        model: a causal language model or an encoder-decoder of transformers.
        batch: input_ids (examples, tokens), attention_mask, ...; labels of its tokens, if any.
        tokens: ids of the vocabulary; without them all of it.

    Returns:
        (examples, P, vocabulary or len(tokens)): before each label other than -100 where labels
        belong to tokens, from the left, P as many as an example has at most; otherwise at the last
        real position, P = 1.
    """
    once = token_labels(batch) is None
    where = LogitsLoss(
        _no_loss, last_positions if once else None, tokens=tokens, width=1 if once else None
    )
    return at_least_fp32(where.logits(model, batch))


def _no_loss(logits: Tensor, batch: Any) -> Tensor:
    raise RuntimeError("label_logits reads logits only")


def next_token() -> LogitsLoss:
    """Language modelling: the negative log-likelihood of each next token, (examples, P).

        loss_bt = -log softmax(logits_bt)[token_b(t+1)]

    Read at every real token that has a successor, or, where the batch has labels for its tokens,
    before labels other than -100; of these at those in the mask that ``step`` is given, if any.
    Padding on either side and packed sequences are understood. The head forms the logits of a few
    positions at a time, never those of the whole batch, unless the model works on them further.
    """
    return _NextToken()


class _NextToken(LogitsLoss):
    """fn gets its targets in the batch, since they follow the positions of each call."""

    def __init__(self) -> None:
        super().__init__(self._cross_entropy, _before_a_target)

    def scored(self, batch: Any, positions: Tensor | None = None) -> Tensor:
        own = super().scored(batch)
        if positions is None:
            return own
        mask = super().scored(batch, positions) & own
        if readable(mask) and not bool(mask.any()):
            raise ValueError(
                "positions: expected at least one token with a real successor, or before a label "
                "other than -100, got none; mark the token in front of one that is predicted"
            )
        return mask

    def losses(self, logits: Tensor, batch: Any, index: Tensor) -> Tensor:
        return self.fn(logits, {**batch, _TARGETS: _next_tokens(batch, index)})

    def at(self, model: nn.Module, batch: Any, index: Tensor, valid: Tensor) -> Tensor:
        """Logits are formed a few positions at a time, where nothing follows the model's head."""
        hidden = hidden_at(model, batch, index)
        if hidden is None:
            return super().at(model, batch, index, valid)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        losses = next_token_losses(hidden, _next_tokens(batch, index), head)
        return torch.where(valid, losses, 0.0)

    def _cross_entropy(self, logits: Tensor, batch: Any) -> Tensor:
        targets = batch.get(_TARGETS)
        if targets is None:  # called by itself, on logits at its own positions
            targets = _next_tokens(batch, compact(self.scored(batch))[0])
        return next_token_losses(logits, targets)


_TARGETS = "next_token_targets"


def _next_tokens(batch: Any, index: Tensor) -> Tensor:
    """What is predicted at ``index`` (examples, P)."""
    labels = token_labels(batch)
    decoder = "decoder_input_ids" in batch
    if labels is None:
        labels = batch["decoder_input_ids" if decoder else "input_ids"].roll(-1, 1)
    elif not decoder:  # a decoder's input is its labels shifted already
        labels = labels.roll(-1, 1)
    return take(labels, index.to(labels.device)).clamp(min=0)


def _before_a_target(batch: Any) -> Tensor:
    labelled = labelled_positions(batch)
    return next_positions(batch) if labelled is None else labelled
