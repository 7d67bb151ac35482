"""perturb_ and fold_ above the ranks that have kernels: torch, in blocks of 1 MiB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rng import round_stochastic, rounding_stream, words
from . import reference

NATIVE_RANK = 256

_BLOCK_ELEMENTS = 1 << 18


def _blocks(w: Tensor, rows: int, columns: int) -> Iterator[tuple[Tensor, int]]:
    """Rows of w as (rows, columns) by the MiB of fp32, each block with its first row."""
    if w.is_contiguous():
        w = w.view(rows, columns)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield w[start : start + step], start


@reference._exact_products
def fold_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    *,
    decay: float = 1.0,
    rounding: str = "nearest",
    rng: Tensor | None = None,
    stream: int = 0,
) -> None:
    rows, columns = u.shape[0], v.shape[0]
    if not w.is_contiguous() and tuple(w.shape) != (rows, columns):
        reference.fold_(w, u, v, core, decay=decay, rounding=rounding, rng=rng, stream=stream)
        return
    stochastic = rounding == "stochastic" and w.dtype != torch.float32
    right = core @ v.float().T
    for part, start in _blocks(w, rows, columns):
        value = decay * part.float() + u[start : start + len(part)].float() @ right
        if stochastic:
            assert rng is not None
            word = words(rng, rounding_stream(stream), value.numel(), start=start * columns).view(
                value.shape
            )
            value = round_stochastic(value, word, w.dtype)
        part.copy_(value)


@reference._exact_products
def perturb_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    coeff: Tensor,
    rng: Tensor,
    *,
    stream: int,
    rounding: str = "nearest",
) -> None:
    rank = u.shape[1]
    noise = reference._noise(u.new_empty(rank, rank), coeff, rng, stream, torch.float32)
    core = reference._scale(u, v) * noise
    fold_(w, u, v, core, rounding=rounding, rng=rng, stream=stream)
