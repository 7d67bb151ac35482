"""Prompts to token batches: dicts of tensors with the examples along axis 0.

Sequences are padded on the left, so that the last position of every row is the last real token
and logits are formed for one position only. ``pack`` puts them behind each other instead.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .tasks import Example

Batch = dict[str, Tensor]


class Encoder:
    """Token ids of prompts and padded batches of them for one model.

    Args:
        tokenizer: of transformers.
        model: gets position_ids where its forward takes them: models with learned positions would
            otherwise count the padding.
        max_tokens: longer prompts lose tokens at their beginning, the question stays.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, max_tokens: int = 512) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.device = next(model.parameters()).device
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else tokenizer.eos_token_id or 0

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each prompt, special tokens in front kept, those behind dropped."""
        prompts = [e.prompt for e in examples]
        if not prompts:
            return []
        plain = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        full = self.tokenizer(prompts, add_special_tokens=True)["input_ids"]
        encoded = []
        for bare, ids in zip(plain, full, strict=True):
            front = ids[: max(0, _find(ids, bare))]
            room = max(1, self.max_tokens - len(front))
            encoded.append(front + bare[-room:])
        return encoded

    def collate(self, encoded: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
        """input_ids, attention_mask (position_ids) int64 (examples, tokens), labels (examples,)."""
        width = max(len(ids) for ids in encoded)
        ids = torch.full((len(encoded), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(list(labels))}
        if self._positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def sorted_batches(
        self, examples: Sequence[Example], tokens: int = 4096
    ) -> Iterator[tuple[list[int], Batch]]:
        """All examples, of like length together, at most ``tokens`` padded tokens a batch.

        Yields:
            positions of the batch's rows in ``examples``, and the batch.
        """
        encoded = self.encode(examples)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(encoded[order[end]]) <= tokens:
                end += 1
            rows = order[start:end]
            yield rows, self.collate([encoded[i] for i in rows], [examples[i].label for i in rows])
            start = end


class TrainBatches:
    """Batches for training, drawn by seed, without end: every example once an epoch.

    Each epoch is shuffled, cut into pools of ``pool`` batches, sorted by length inside a pool and
    the batches shuffled again: little padding, yet any two examples may meet.
    """

    def __init__(
        self, encoder: Encoder, examples: Sequence[Example], size: int, seed: int, pool: int = 16
    ) -> None:
        self.encoder = encoder
        self.encoded = encoder.encode(examples)
        self.labels = [e.label for e in examples]
        self.size = min(size, len(examples))
        self.pool = pool
        self.rng = random.Random(seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for rows in self._epoch():
                yield self.encoder.collate(
                    [self.encoded[i] for i in rows], [self.labels[i] for i in rows]
                )

    def _epoch(self) -> list[list[int]]:
        order = list(range(len(self.encoded)))
        self.rng.shuffle(order)
        batches = []
        for start in range(0, len(order), self.size * self.pool):
            pool = sorted(order[start : start + self.size * self.pool], key=self._length)
            cut = [pool[i : i + self.size] for i in range(0, len(pool), self.size)]
            batches += [rows for rows in cut if len(rows) == self.size]
        self.rng.shuffle(batches)
        return batches

    def _length(self, i: int) -> int:
        return len(self.encoded[i])


def pack(batch: Batch, length: int | None = None, mask: torch.dtype | None = None) -> Batch:
    """The same examples without padding: one behind the other in a single row.

    A model of transformers keeps them apart by their position ids: its attention, of whatever
    implementation, sees each sequence alone. A step's groups are rows, and share the layout. The
    step costs the tokens there are, instead of as many for each example as the longest has; the
    attention mask that SDPA is given is (1, 1, tokens, tokens).

    Args:
        batch: input_ids (examples, tokens), attention_mask, padded on either side, or none, and
            labels (examples,).
        length: tokens of the result; what is left is filled with a sequence that no loss reads,
            so that batches of like size share a captured step.
        mask: dtype of an attention mask (1, 1, tokens, tokens), 0 where a token sees another and
            the least number elsewhere, for models that do not look at position ids for it: OPT.

    Returns:
        input_ids and position_ids int64 (1, tokens), labels (1, examples); objectives such as
        ``label_words(ids, packed=examples)`` read it. It waits for the batch's device.

    Raises:
        ValueError: more tokens than ``length``.
    """
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    tokens, positions = ids[real], (real.cumsum(1) - 1)[real]
    if length is not None:
        spare = length - len(tokens)
        if spare < 0:
            raise ValueError(
                f"length: expected at least the {len(tokens)} tokens of the batch, got {length}; "
                "take a longer one"
            )
        tokens = torch.cat([tokens, tokens[:1].expand(spare)])
        positions = torch.cat([positions, torch.arange(spare, device=ids.device)])
    packed = {"input_ids": tokens[None], "position_ids": positions[None]}
    if mask is not None:
        packed["attention_mask"] = _mask_of(positions, mask)
    return packed | {"labels": batch["labels"][None]}


def _mask_of(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive, (1, 1, tokens, tokens): a token sees its sequence up to itself."""
    sequence = (positions == 0).cumsum(0)
    order = torch.arange(len(positions), device=positions.device)
    sees = (sequence[:, None] == sequence) & (order[:, None] >= order)
    least = torch.full(sees.shape, torch.finfo(dtype).min, dtype=dtype, device=positions.device)
    return least.masked_fill_(sees, 0)[None, None]


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where ``part`` begins in ``ids``, -1 if it does not occur."""
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return start
    return -1
