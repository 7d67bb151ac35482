"""Block shapes of the kernels: chosen so that no hot one spills registers; not yet tuned."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Update(NamedTuple):
    """How lowrank_update's kernels cut W. A tile is ``rows`` by ``parts`` times 64 bytes."""

    rows: int
    parts: int
    warps: int
    stages: int
    registers: int | None = None  # a thread's at most: without, the compiler takes what it likes
    most_tiles: int = 32  # of an item
    items: int = 8  # per multiprocessor, at least, for as long as an item has tiles
    resident: int = 0  # programs per multiprocessor that take items in turn; 0: one item each


def update(
    dtype: torch.dtype, v_dtype: torch.dtype, rank: int, *, aligned: bool, exact: bool,
    stochastic: bool,
) -> Update:  # fmt: skip
    """The shape for the dtypes of W and V and the padded rank, 16 to 256.

    Strips have 64 rows whatever the layout and the rounding: the instruction of the tensor cores,
    and so the order of summation, must be the same for a matrix however it lies in memory.
    """
    if exact:
        return Update(32, 2, 4 if rank == 16 else 8, 1)
    if not aligned:
        return Update(64, 2, 8, 1)
    plain = v_dtype == torch.bfloat16
    if rank > 64:
        return Update(64, 2, 4 if plain or rank <= 128 else 8, 2)
    if dtype == torch.float32:
        return Update(64, 2, 4, 2, 168)
    if stochastic:
        return Update(64, 2, 4, 3, 168 if plain else None)
    return Update(64, 2, 4, 3, 128 if plain else 168)


class Noise(NamedTuple):
    """How many 16-byte units of elements a program of the noise-bound kernels makes at a time."""

    units: int
    warps: int
    steps: int = 1


NORMAL = Noise(512, 4)
DENSE = Noise(128, 4, 4)
CORE = Noise(128, 4)
ROWS = Noise(128, 4)


class Outer(NamedTuple):
    """noise_outer_: noise of ``rows`` by ``columns`` at a time."""

    rows: int
    columns: int
    warps: int


def outer(width: int) -> Outer:
    return Outer(128 if width <= 64 else 64, 16, 4)


SUM = Outer(32, 64, 4)


class Norm(NamedTuple):
    """grouped_norm: a program does ``rows`` rows of one group, a row in registers at a time."""

    rows: int
    columns: int
    warps: int


def norm(n: int, rows: int) -> Norm:
    """For rows of ``n``, ``rows`` of all groups: many take turns with the same weights."""
    columns = max(32, 1 << (n - 1).bit_length())
    if columns > 8192:  # there are no registers for more than one row
        return Norm(1, columns, 16)
    return Norm(min(16, max(1, rows // 512)), columns, max(1, columns // 512))
