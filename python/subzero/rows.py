"""Rows of activations: which example and token each is, which carry noise, which are scored.

A row of the RNG contract is example * 2**20 + position. The position counts the real tokens of the
sequence in front of it, so padding on either side and packing change nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POSITION_BITS = 20


@dataclass(frozen=True)
class Grid:
    """Every row of one micro-batch along one token axis; all tensors (batch rows, tokens).

    Attributes:
        example: int64, the sequence's number in the step; micro-batches count on.
        position: int64, real tokens of the sequence in front of the row.
        real: bool, False on padding.
        first: number of the first example, 0-d int64 where packed sequences came before.
        packed: whether a batch row may hold several examples.
    """

    example: Tensor
    position: Tensor
    real: Tensor
    first: int | Tensor
    packed: bool

    @property
    def last(self) -> Tensor:
        """Number of the last example, 0-d int64."""
        return self.example[-1, -1]

    @property
    def next(self) -> int | Tensor:
        """Number of the first example that comes after these."""
        return self.last + 1 if self.packed else self.first + self.example.shape[0]

    @functools.cached_property
    def ids(self) -> Tensor:
        """Rows of the RNG contract."""
        return self.example << POSITION_BITS | self.position


def make_grid(
    rows: int,
    tokens: int,
    device: torch.device,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    first: int | Tensor = 0,
) -> Grid:
    """The grid of a batch of ``rows`` by ``tokens``.

    Args:
        mask: (rows, tokens), zero on padding; None: everything is real.
        position_ids: (rows or 1, tokens). Where they start again inside a row, sequences were
            packed, and each counts as an example of its own.
        first: number of the first example.
    """
    real = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if mask is not None and mask.shape == real.shape:
        real = mask.bool().to(device)
    if position_ids is not None and position_ids.shape == (1, tokens):
        position_ids = position_ids.expand(rows, tokens)
    before = real.long().cumsum(1) - real.long()
    if position_ids is None or position_ids.shape != real.shape:
        example = torch.arange(rows, device=device)[:, None].expand(rows, tokens) + first
        return Grid(example, before, real, first, False)
    begins = torch.zeros_like(real)
    begins[:, 0] = True
    both = real[:, 1:] & real[:, :-1]
    begins[:, 1:] = both & (position_ids[:, 1:] <= position_ids[:, :-1]).to(device)
    example = begins.flatten().cumsum(0).view(rows, tokens) - 1
    at_begin = torch.where(begins, before, torch.full_like(before, -1)).cummax(1).values
    return Grid(example + first, before - at_begin, real, first, True)


def main_grid(batch: Any, examples: int, first: int | Tensor) -> Grid | None:
    """The grid of the tokens that logits belong to; None where the batch names no token axis."""
    tokens, mask, positions = _main_axis(batch)
    if tokens is None:
        return None
    return make_grid(examples, tokens.shape[1], tokens.device, mask, positions, first)


def real_tokens(batch: Any, examples: int) -> Tensor | None:
    """``main_grid(...).real`` without the rest of it: bool (examples, tokens), or None."""
    tokens, mask, _ = _main_axis(batch)
    if tokens is None:
        return None
    shape = (examples, tokens.shape[1])
    if mask is not None and mask.shape == shape:
        return mask.to(tokens.device, torch.bool)
    return torch.ones(shape, dtype=torch.bool, device=tokens.device)


def _main_axis(batch: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tokens that logits belong to, their mask and position ids; None where there are none."""
    if not isinstance(batch, Mapping):
        return None, None, None
    names = [("input_ids", "attention_mask"), ("inputs_embeds", "attention_mask")]
    if "decoder_input_ids" in batch:
        names = [("decoder_input_ids", "decoder_attention_mask")]
    for name, mask in names:
        tokens = batch.get(name)
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            positions = batch.get("position_ids") if mask == "attention_mask" else None
            return tokens, batch.get(mask), positions
    return None, None, None


def with_decoder_tokens(model: nn.Module, batch: Any) -> Any:
    """The batch with a decoder's tokens by name: an encoder-decoder makes them of its labels.

    Only their shape matters, to grids and masks; objectives get the batch as it came.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(batch, Mapping):
        return batch
    labels = batch.get("labels")
    if "decoder_input_ids" in batch or not isinstance(labels, Tensor) or labels.dim() != 2:
        return batch
    return {**batch, "decoder_input_ids": labels}


def encoder_grid(batch: Any, examples: int, first: int | Tensor) -> Grid | None:
    """The grid of an encoder-decoder's source tokens."""
    if not isinstance(batch, Mapping) or "decoder_input_ids" not in batch:
        return None
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor):
        return None
    return make_grid(
        examples, tokens.shape[1], tokens.device, batch.get("attention_mask"), None, first
    )


def token_labels(batch: Any) -> Tensor | None:
    """``labels`` where there is one for each token that logits belong to, else None."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        return None
    tokens = batch.get("decoder_input_ids", batch.get("input_ids", batch.get("inputs_embeds")))
    labels = batch["labels"]
    same = isinstance(tokens, Tensor) and labels.dim() == 2 and labels.shape == tokens.shape[:2]
    return labels if same else None


def labelled_positions(batch: Any) -> Tensor | None:
    """Positions before labels other than -100, bool (examples, tokens).

    A decoder's input is its labels shifted by one already: there the position of a label itself.
    """
    labels = token_labels(batch)
    if labels is None:
        return None
    if "decoder_input_ids" in batch:
        return labels != -100
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def check_positions(positions: Any, examples: int, tokens: int | None) -> Tensor:
    """A mask the user gave, as bool (examples, tokens), or one error."""
    if not isinstance(positions, Tensor):
        raise TypeError(
            f"positions: expected a mask tensor (examples, tokens), got "
            f"{type(positions).__name__}; pass for example labels != -100"
        )
    wanted = (examples, positions.shape[-1] if tokens is None else tokens)
    if positions.dim() != 2 or tuple(positions.shape) != wanted:
        raise ValueError(
            f"positions: expected a mask of shape {wanted}, got {tuple(positions.shape)}; "
            "give one entry for each token of the batch"
        )
    return positions.bool()


def scored_positions(
    batch: Any,
    examples: int,
    real: Tensor | None,
    positions: Tensor | Callable[[Any], Tensor] | None,
) -> Tensor | None:
    """The mask (examples, tokens) the loss reads: as given, else from labels; None: not known.

    Padding, where ``real`` (examples, tokens) is False, is never scored. A mask on a device is not
    read: one without any position gives no loss, and the step is skipped.
    """
    given = positions(batch) if callable(positions) else positions
    if given is None:
        mask = labelled_positions(batch)
    else:
        mask = check_positions(given, examples, None if real is None else real.shape[1])
    if mask is None:
        return None
    if real is not None:
        mask = mask.to(real.device) & real
    if readable(mask):
        require_scored(mask)
    return mask


def readable(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def require_scored(mask: Tensor) -> None:
    """One error where no position is scored; it waits for the mask's device."""
    if not bool(mask.any()):
        raise ValueError(
            "positions: expected at least one real token that the loss reads, got none; "
            "mark one in the mask, or label one"
        )


def last_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """The last real token of each example, bool (examples, tokens)."""
    ids = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    order = torch.arange(ids.shape[1], device=ids.device)
    if mask is None:
        return (order == ids.shape[1] - 1).expand(ids.shape)
    last = (mask * (order + 1)).argmax(1, keepdim=True)
    return order == last


def sequence_ends(batch: Mapping[str, Tensor], count: int) -> Tensor:
    """The last token of the first ``count`` sequences of each packed row, bool (rows, tokens)."""
    positions = batch["position_ids"]
    ends = torch.ones_like(positions, dtype=torch.bool)
    ends[:, :-1] = positions[:, 1:] <= positions[:, :-1]
    return ends & (ends.cumsum(1) <= count)


def next_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Real tokens whose successor is a real token of the same sequence, bool (examples, tokens)."""
    grid = main_grid(batch, len(batch["input_ids"]), 0)
    assert grid is not None
    mask = torch.zeros_like(grid.real)
    mask[:, :-1] = (
        grid.real[:, :-1] & grid.real[:, 1:] & (grid.example[:, :-1] == grid.example[:, 1:])
    )
    return mask


def compact(mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The true entries of each row, in order and from the left.

    Args:
        width: P, where it is known: at least the largest count of a row. Otherwise it is read,
            which waits for the device.

    Returns:
        index (rows, P) int64 and valid (rows, P) bool, P the largest count of a row; entries that
        are not valid point at the row's first one (at 0 in a row without any).
    """
    if width == 1:
        return mask.to(torch.int8).argmax(1, keepdim=True), mask.any(1, keepdim=True)
    count = mask.sum(1)
    if width is None:
        width = int(count.max())
    index = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, :width]
    valid = torch.arange(width, device=mask.device) < count[:, None]
    return torch.where(valid, index, index[:, :1] * (count[:, None] > 0)), valid


def span(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First true entry of each row, and the distance from it to the last plus one: (rows,) both.

    A row without any gives its last index and a length below one.
    """
    tokens = mask.shape[1]
    order = torch.arange(tokens, device=mask.device)
    first = torch.where(mask, order, tokens - 1).amin(1)
    last = torch.where(mask, order, -1).amax(1)
    return first, last - first + 1


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor (rows, tokens, ...) at index (rows, P): (rows, P, ...)."""
    tail = tensor.shape[2:]
    return tensor.gather(1, index.view(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail))
