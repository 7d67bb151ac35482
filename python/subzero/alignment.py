"""Bases aligned with the activations: the top right-singular vectors of the rows a linear sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subzero_kernels import PURPOSE_BASIS_V, make_rng, normal_, stream_id

# Directions whose singular value is below this part of the largest are rounding noise of fp32 rows.
_NEGLIGIBLE = 1e-6


def aligned_bases(
    rows: Sequence[Tensor], indices: Sequence[int], rank: int, seed: int, window: int
) -> list[Tensor]:
    """V (n, r) for each linear: orthonormal columns, float64.

    The top r right-singular vectors of its rows x / |x| (N, n), not centred, by descending singular
    value; where the rows span fewer than r directions, completed by the contract's purpose-3
    normals (n, r) of draw ``window``, column by column, orthogonalised against them.

    Args:
        rows: one (N, n) tensor a linear.
        indices: parameter index of each, names the stream of the completing normals.
    """
    bases: list[Tensor | None] = [None] * len(rows)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, some in enumerate(rows):
        shapes.setdefault(tuple(some.shape), []).append(i)
    for members in shapes.values():  # one batched decomposition for all linears of a shape
        stacked = torch.stack([rows[i] for i in members]).double()
        for i, basis in zip(members, _top_directions(stacked, rank), strict=True):
            missing = rank - basis.shape[1]
            bases[i] = _completed(basis, missing, indices[i], rank, seed, window)
    return [basis for basis in bases if basis is not None]


def _top_directions(rows: Tensor, rank: int) -> list[Tensor]:
    """rows (L, N, n) -> at most ``rank`` right-singular vectors of each, (n, q)."""
    count, width = rows.shape[1:]
    if count == 0:
        return [row.new_zeros(width, 0) for row in rows]
    if count <= width:
        # through the smaller Gram matrix, in float64: rows are fp32, so its square fits
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
        directions = rows.mT @ vectors[..., :rank]
    else:
        values, directions = torch.linalg.eigh(rows.mT @ rows)
        values, directions = values.flip(-1).clamp(min=0), directions.flip(-1)[..., :rank]
    kept = (values > _NEGLIGIBLE**2 * values[..., :1]).sum(-1).clamp(max=rank)
    return [
        d[:, :q] / torch.linalg.vector_norm(d[:, :q], dim=0)
        for d, q in zip(directions, kept.tolist(), strict=True)
    ]


def _completed(
    basis: Tensor, missing: int, index: int, rank: int, seed: int, window: int
) -> Tensor:
    """Orthonormal (n, r) whose leading columns are the given ones."""
    if missing:
        noise = torch.empty(basis.shape[0], rank, dtype=torch.float32, device=basis.device)
        stream = stream_id(PURPOSE_BASIS_V, index)
        normal_(noise, make_rng(seed, window, basis.device), stream)
        basis = torch.cat([basis, noise[:, :missing].double()], 1)
    q, r = torch.linalg.qr(basis)
    return q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
