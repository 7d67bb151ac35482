"""The micro-batches of a step of activation noise: which rows are noisy, which are read.

How large tensors are follows from shapes and, for a LogitsLoss, from how many positions an example
has at most. Where that is not known it is read from the device, once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .activation import NoisyRows
from .objectives import LogitsLoss
from .rows import Grid, compact, require_scored, span, take


@dataclass(frozen=True)
class Extent:
    """What a LogitsLoss reads of one micro-batch at most.

    Attributes:
        width: P, positions of an example.
        length: tokens from an example's first position to its last.
        unpacked: whether each batch row is one sequence, as queries that cost a row need.
    """

    width: int
    length: int
    unpacked: bool


@dataclass
class Micro:
    """One micro-batch, its rows and, once evaluated, its losses.

    index (B, P) int64: positions that are read, of which ``valid`` (B, P) ones count; None: every
    token is, and valid is (B, T). clean (B,) or (B, P), differences (K, B) or (K, B, P): losses
    less the clean ones, zero where not valid.

    Attributes:
        everywhere: noise enters every real row, not only those that are read.
        encoder: rows of an encoder-decoder's source, noisy as well.
        fits: whether the extent suffices, 0-d bool; None: it was made for this batch.
    """

    batch: Any
    examples: int
    grid: Grid
    everywhere: bool
    encoder: Grid | None
    index: Tensor | None
    valid: Tensor
    extent: Extent | None = None
    fits: Tensor | None = None
    clean: Tensor = field(init=False, repr=False)
    differences: Tensor = field(init=False, repr=False)

    @property
    def by_token(self) -> bool:
        return self.clean.dim() == 2

    @property
    def whole(self) -> bool:
        """Whether entries of the noisy rows are the tokens of the grid, else those of ``index``."""
        return self.everywhere or self.index is None

    @property
    def live(self) -> Tensor:
        """Which entries are noisy rows, (B, T) or (B, P)."""
        return self.grid.real if self.everywhere else self.valid

    @property
    def ids(self) -> Tensor:
        """The contract's row of each entry."""
        return self.at_entries(self.grid.ids)

    def at_entries(self, of_tokens: Tensor) -> Tensor:
        """(B, T) at the noisy rows' entries."""
        return of_tokens if self.whole else self.at_read(of_tokens)

    def at_read(self, of_tokens: Tensor) -> Tensor:
        """(B, T) at what is read."""
        return of_tokens if self.index is None else take(of_tokens, self.index)

    def axes(self) -> dict[str, NoisyRows]:
        """The noisy rows of a whole group on each token axis."""
        rows, tokens = self.grid.real.shape
        index = None
        if not self.whole:
            assert self.index is not None
            start = torch.arange(rows, device=self.index.device)[:, None] * tokens
            index = (start + self.index).flatten()
        axes = {"main": NoisyRows(rows * tokens, index, self.ids.flatten(), self.live.flatten())}
        if self.encoder is not None:
            source = self.encoder
            count = source.real.numel()
            axes["encoder"] = NoisyRows(count, None, source.ids.flatten(), source.real.flatten())
        return axes


def extent_of(objective: LogitsLoss, mask: Tensor, given: Any, grid: Grid) -> Extent:
    """How much of a micro-batch is read; it waits for the device unless the loss says so.

    Args:
        mask: what is read, bool (examples, tokens).
        given: the positions of this step, which may be more than those of the loss.
    """
    if objective.width == 1 and given is None and not grid.packed:
        return Extent(1, 1, True)
    counts = [mask.sum(1).max(), span(mask)[1].max()]
    if grid.packed:
        counts.append(grid.last - grid.first)
    width, length, *last = torch.stack(counts).tolist()
    if not width:
        require_scored(mask)
    return Extent(width, length, not last or last[0] + 1 == len(mask))


def fits_in(extent: Extent, mask: Tensor, grid: Grid) -> Tensor:
    """Whether a mask reads no more than that, 0-d bool."""
    fits = (mask.sum(1) <= extent.width).all() & (span(mask)[1] <= extent.length).all()
    if extent.unpacked and grid.packed:
        fits = fits & (grid.last - grid.first + 1 == len(mask))
    return fits


def reading(
    objective: LogitsLoss, mask: Tensor, given: Any, grid: Grid, known: Extent | None
) -> tuple[Tensor, Tensor, Extent, Tensor | None]:
    """index, valid (examples, P), extent and ``fits`` of a micro-batch."""
    extent = extent_of(objective, mask, given, grid) if known is None else known
    fits = None if known is None else fits_in(known, mask, grid)
    return *compact(mask, extent.width), extent, fits


def serves_rows(micro: Micro) -> bool:
    """Whether queries of this micro-batch may cost a row, where the model allows it."""
    return (
        micro.extent is not None
        and micro.extent.unpacked  # packed rows need a mask of their own
        and isinstance(micro.batch, Mapping)
        and "input_ids" in micro.batch
    )
