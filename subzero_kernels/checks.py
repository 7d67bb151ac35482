"""The pieces of the ops' validation: one fact each, and one form of error.

A message names the argument, what was expected, what came, and a remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from .overlap import Region, clashes, regions

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDINGS = ("nearest", "stochastic")

Named = tuple[str, Tensor]


def fail(name: str, expected: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}; {remedy}")


def names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        got = names([tensor.dtype])
        remedy = f"convert it with .to(torch.{names(dtypes[:1])})"
        raise TypeError(f"{name}: expected {names(dtypes)}, got {got}; {remedy}")


def check_companion(name: str, tensor: Tensor, like: Tensor) -> None:
    """u, v or bias: the dtype of the weight or fp32."""
    if tensor.dtype is not like.dtype and tensor.dtype is not torch.float32:
        check_dtype(name, tensor, sorted({like.dtype, torch.float32}, key=str))


def check_small(name: str, tensor: Tensor, like: Tensor) -> None:
    """A core or coefficients: fp32; for float64 weights float64 too."""
    if tensor.dtype is not torch.float32:
        double = like.dtype is torch.float64
        check_dtype(name, tensor, [torch.float32] + [torch.float64] * double)


def check_device(tensors: Iterable[Named]) -> None:
    first: Named | None = None
    for name, tensor in tensors:
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            device = first[1].device
            raise fail(
                name,
                f"device {device} as {first[0]}",
                tensor.device,
                f"move it with .to({str(device)!r})",
            )


def check_no_grad(tensors: Iterable[Named]) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors:
            if tensor.requires_grad:
                raise fail(
                    name,
                    "no gradient (zeroth-order ops have none)",
                    "requires_grad=True with grad mode on",
                    "call the op under torch.no_grad()",
                )


def row_strided(tensor: Tensor) -> bool:
    """Contiguous, or a matrix whose rows are contiguous and do not overlap."""
    if tensor.is_contiguous():
        return True
    if tensor.dim() != 2:
        return False
    return tensor.stride(1) == 1 and (tensor.shape[0] == 1 or tensor.stride(0) >= tensor.shape[1])


def check_layout(name: str, tensor: Tensor) -> None:
    if not row_strided(tensor):
        raise fail(
            name,
            "a contiguous tensor or a matrix with contiguous rows",
            f"shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            "pass .contiguous(), or for a transposed weight its .T with u and v swapped",
        )


def check_slabs(name: str, tensor: Tensor) -> None:
    """(G, N, c) with contiguous rows of c, none of which meets another."""
    if tensor.is_contiguous() or not tensor.numel():
        return
    reach = tensor.shape[2]
    fits = reach == 1 or tensor.stride(2) == 1
    for stride, size in sorted(
        (tensor.stride(i), tensor.shape[i]) for i in (0, 1) if tensor.shape[i] > 1
    ):
        fits = fits and stride >= reach
        reach += stride * (size - 1)
    if not fits:
        raise fail(
            name,
            "contiguous rows (the last axis) that do not overlap",
            f"shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            "pass a slice of a contiguous tensor, whole or cut along its axes",
        )


def check_rows(name: str, tensor: Tensor) -> None:
    """A matrix with contiguous rows."""
    if not row_strided(tensor):
        raise fail(
            name,
            "contiguous rows",
            f"shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            "pass .contiguous()",
        )


def check_index(name: str, tensor: Tensor, count: int, one: str) -> None:
    """int64 (count,), contiguous: one for each ``one`` of them."""
    check_dtype(name, tensor, [torch.int64])
    if tensor.dim() != 1 or tensor.shape[0] != count:
        raise fail(
            name,
            f"({count},), one per {one}",
            tuple(tensor.shape),
            f"pass one number for each {one}",
        )
    check_contiguous(name, tensor)


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise fail(name, "a contiguous tensor", f"strides {tensor.stride()}", "pass .contiguous()")


def check_memory(
    written: Iterable[Named], read: Iterable[Named], same: Collection[tuple[str, str]] = ()
) -> None:
    """No written tensor shares memory with another; a pair in ``same`` may be one and the same."""
    held = [r for name, t in written if t.numel() for r in regions(name, t, written=True)]
    held += [r for name, t in read if t.numel() for r in regions(name, t, written=False)]
    for target, other in clashes(held):
        if (target.name, other.name) in same and target.same_memory(other):
            continue
        raise memory_error(target, other)


def memory_error(target: Region, other: Region) -> ValueError:
    return fail(
        target.name,
        "memory of its own",
        f"an overlap with {other.name}",
        f"pass {other.name}.clone(), or leave out a tied weight",
    )


def check_stream(name: str, stream: int) -> None:
    if stream < 0 or stream > 0xFFFFFFFF:
        raise fail(name, "0 <= stream < 2**32", stream, "build it with stream_id(purpose, index)")


def check_count(name: str, items: Sequence[object], lead: str, count: int) -> None:
    if len(items) != count:
        raise fail(
            name,
            f"{count} entries, one per tensor of {lead}",
            len(items),
            "pass lists of one length",
        )


def check_streams(streams: Sequence[int], lead: str, count: int) -> None:
    check_count("streams", streams, lead, count)
    for i, stream in enumerate(streams):
        check_stream(f"streams[{i}]", stream)


def check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise fail("rounding", "'nearest' or 'stochastic'", repr(rounding), "pass one of these")


def check_rng(rng: Tensor) -> None:
    check_dtype("rng", rng, [torch.int64])
    if rng.dim() != 1 or rng.shape[0] != 2:
        raise fail(
            "rng",
            "(2,) holding [seed, draw]",
            tuple(rng.shape),
            "build it with make_rng(seed, draw)",
        )
    check_contiguous("rng", rng)


def check_coeff(coeff: Tensor, like: Tensor | None) -> None:
    if like is not None:
        check_small("coeff", coeff, like)
    if coeff.dim() != 1 or coeff.shape[0] < 1:
        raise fail(
            "coeff",
            "(K,) with one fp32 number per query, K >= 1",
            tuple(coeff.shape),
            "pass torch.tensor([eps])",
        )
    check_contiguous("coeff", coeff)


def check_weight(name: str, w: Tensor) -> None:
    check_dtype(name, w, WEIGHT_DTYPES)
    check_layout(name, w)


def check_factors(w: Named, u: Named, v: Named, *, reshape: bool) -> None:
    """u (m', r), v (n', r): (m', n') is w's shape or, for ops that reshape, m' n' = numel."""
    for name, factor in (u, v):
        if factor.dim() != 2:
            raise fail(
                name,
                "(rows, rank)",
                tuple(factor.shape),
                "build it with orthonormal_basis(rows, rank, ...)",
            )
        check_companion(name, factor, w[1])
        check_layout(name, factor)
    rows, rank = u[1].shape
    columns = v[1].shape[0]
    fits = rows * columns == w[1].numel() if reshape else (rows, columns) == tuple(w[1].shape)
    if not fits or v[1].shape[1] != rank:
        raise _factor_error(w, u, v, reshape=reshape)
    if not 1 <= rank <= min(rows, columns):
        raise fail(
            u[0],
            f"1 <= rank <= {min(rows, columns)} for {w[0]} as ({rows}, {columns})",
            f"rank {rank}",
            f"use min(rank, {rows}, {columns})",
        )


def _factor_error(w: Named, u: Named, v: Named, *, reshape: bool) -> ValueError:
    """Blame the factor that does not fit w's own shape, or both where neither does."""
    (rows, rank), (columns, other_rank) = u[1].shape, v[1].shape
    shape = tuple(w[1].shape)
    own_rows, own_columns = shape if len(shape) == 2 else (-1, -1)
    if columns == own_columns or (not reshape and rows != own_rows):
        culprit, wanted = u, (own_rows, other_rank)
    elif rows == own_rows:
        culprit, wanted = v, (own_columns, rank)
    elif rows * columns == w[1].numel():
        culprit, wanted = u, (rows, other_rank)
    else:
        return fail(
            u[0],
            f"(m', r) and {v[0]} (n', r) with m' n' = {w[1].numel()} for {w[0]} {shape}",
            f"{tuple(u[1].shape)} and {tuple(v[1].shape)}",
            "build them with orthonormal_basis for (m', n') = factor_shape(w.shape, rule)",
        )
    return fail(
        culprit[0],
        f"{wanted} for {w[0]} {shape} at rank {wanted[1]}",
        tuple(culprit[1].shape),
        f"build it with orthonormal_basis({wanted[0]}, {wanted[1]}, ...)",
    )


def check_core(core: Tensor, w: Tensor, rank: int) -> None:
    """core (r, r)."""
    check_small("core", core, w)
    if tuple(core.shape) != (rank, rank):
        raise fail(
            "core",
            f"({rank}, {rank}) for u and v of rank {rank}",
            tuple(core.shape),
            "use the rank of u and v, and one core at a time",
        )
    check_contiguous("core", core)


def check_cores(core: Tensor, w: Tensor, rank: int) -> None:
    """core (G, r, r), one per group."""
    check_small("core", core, w)
    if core.dim() != 3 or core.shape[0] < 1 or tuple(core.shape[1:]) != (rank, rank):
        raise fail(
            "core",
            f"(G, {rank}, {rank}) with G >= 1 for u and v of rank {rank}",
            tuple(core.shape),
            "pass core[None] for one group" if core.dim() == 2 else "use the rank of u and v",
        )
    check_contiguous("core", core)


def check_groups(name: str, tensor: Tensor, groups: int, of: str = "core") -> None:
    """The leading axis is G equal groups."""
    if groups > 1 and (tensor.dim() < 1 or tensor.shape[0] % groups):
        raise fail(
            name,
            f"a leading axis of {groups} equal groups ({of} has {groups})",
            tuple(tensor.shape),
            "stack the groups with torch.cat, group by group",
        )


def numbered(name: str, tensors: Sequence[Tensor]) -> list[Named]:
    return [(f"{name}[{i}]", tensor) for i, tensor in enumerate(tensors)]


def deciding(ws: Sequence[Tensor]) -> Tensor | None:
    """The tensor that decides the backend: a float64 one if any, since only reference takes it."""
    for w in ws:
        if w.dtype is torch.float64:
            return w
    return ws[0] if ws else None
