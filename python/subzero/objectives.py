"""Objectives: one loss per example, in fp32, from one forward.

Each is called as ``objective(batch) -> (examples,)``, the form that ``SubZero.step(batch,
objective)`` evaluates for all signs and queries together. Logits come from the model's own head,
which may be tied, trained and perturbed, and only at the positions that are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class LabelWords:
    """Cross entropy over the label words at the last real position.

        loss_b = -log softmax(logits_b[words])[labels_b]

    Args:
        model: causal language model of transformers.
        words: token of each class.
        padding_side: where the batches are padded. "left" needs the logits of one position only;
            "right" forms them at all positions.

    A batch holds input_ids, attention_mask (examples, tokens) and labels (examples,): the class of
    each example.
    """

    def __init__(self, model: nn.Module, words: Sequence[int], padding_side: str = "left") -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side: expected "left" or "right", got {padding_side!r}')
        self.words = list(words)
        self.padding_side = padding_side
        self._forward = _Forward(model)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses (examples,) fp32."""
        return F.cross_entropy(self.logits(batch), batch["labels"], reduction="none")

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the words (examples, words) fp32."""
        if self.padding_side == "left":
            return self._forward(batch, last_only=True)[:, -1, self.words].float()
        logits = self._forward(batch, last_only=False)
        last = batch["attention_mask"].sum(1) - 1
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, last][:, self.words].float()


class NextToken:
    """Language modelling: the mean negative log-likelihood of each example's own tokens.

        loss_b = -(1 / (n_b - 1)) sum_t log p(token_(t+1) | tokens up to t)

    A batch holds input_ids and attention_mask (examples, tokens), padded on either side. An
    example of a single token scores nothing and has loss 0.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forward = _Forward(model)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses (examples,) fp32."""
        mask = batch["attention_mask"]
        scored = (mask[:, 1:] * mask[:, :-1]).bool()
        targets = batch["input_ids"][:, 1:].masked_fill(~scored, -100)
        logits = self._forward(batch, last_only=False)[:, :-1]
        # A few rows at a time: the fp32 log-softmax is as large as the logits themselves.
        losses = [
            F.cross_entropy(part.transpose(1, 2).float(), target, reduction="none").sum(1)
            for part, target in zip(logits.split(16), targets.split(16), strict=True)
        ]
        return torch.cat(losses) / scored.sum(1).clamp(min=1)


class _Forward:
    """The model's logits (examples, positions, vocabulary), at the last position only if asked."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        taken = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in taken
        self._cached = "use_cache" in taken

    def __call__(self, batch: Mapping[str, Tensor], last_only: bool) -> Tensor:
        options: dict[str, Any] = {"use_cache": False} if self._cached else {}
        if last_only and self._keeps:
            options["logits_to_keep"] = 1
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        return self.model(**inputs, **options).logits
