"""The native CPU backend: tensors to the launch API of csrc/lowrank.h.

Noise, perturbations and folds run in ``_native`` on torch's number of threads. The two low-rank
forwards compose torch's GEMMs: one with W as it lies there, one skinny one and the rank-r tail;
grouped_norm is the reference's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from . import _native_args as args
from .reference import _exact_products
from .reference import grouped_norm as grouped_norm

OPS = frozenset(
    {
        "philox4x32",
        "normal_",
        "perturb_",
        "perturb_many_",
        "perturb_dense_",
        "core_noise_",
        "fold_",
        "add_noise_",
        "noise_outer_",
        "lowrank_linear",
        "lowrank_embedding",
        "grouped_norm",
    }
)

# fp32 copies of 16-bit weights are made this many elements at a time.
_BLOCK_ELEMENTS = 1 << 20


def available() -> tuple[bool, str]:
    """Whether the native module was built, and which instruction set it runs on."""
    if args.native is None:
        return False, args.why_missing
    info = args.native.build_info()
    return True, f"native code on {info['isa']}, built by {info['compiler']}"


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    words = torch.empty_like(counter)
    args.require().cpu.philox4x32(
        counter=counter.data_ptr(),
        key=key.data_ptr(),
        words=words.data_ptr(),
        count=counter.shape[0],
        threads=torch.get_num_threads(),
    )
    return words


def normal_(out: Tensor, rng: Tensor, stream: int) -> None:
    args.require().cpu.normal_(
        out=args.matrix(out), rng=rng.data_ptr(), stream=stream, threads=torch.get_num_threads()
    )


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
    args.require().cpu.perturb_(
        item=args.low_rank(w, u, v, stream),
        queries=args.queries(coeff, rng),
        rounding=args.rounding(rounding),
        threads=torch.get_num_threads(),
    )


class PerturbPlan:
    """perturb_many_ on one list of matrices, whose addresses are taken once.

    Whoever makes it keeps the memory alive.
    """

    def __init__(
        self,
        ws: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        streams: Sequence[int],
    ) -> None:
        self._plan = args.require().cpu.PerturbPlan(
            [args.low_rank(w, u, v, s) for w, u, v, s in zip(ws, us, vs, streams, strict=True)]
        )

    def perturb_(self, coeff: Tensor, rng: Tensor, rounding: str = "nearest") -> None:
        self._plan.perturb_(
            queries=args.queries(coeff, rng),
            rounding=args.rounding(rounding),
            threads=torch.get_num_threads(),
        )


perturb_plan = PerturbPlan


def prepare_perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Callable[[Tensor, Tensor], None]:
    return functools.partial(PerturbPlan(ws, us, vs, streams).perturb_, rounding=rounding)


def perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    PerturbPlan(ws, us, vs, streams).perturb_(coeff, rng, rounding)


def prepare_perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Callable[[Tensor, Tensor], None]:
    items, how = args.dense(ws, streams), args.rounding(rounding)

    def run(coeff: Tensor, rng: Tensor) -> None:
        args.require().cpu.perturb_dense_(
            items=items,
            queries=args.queries(coeff, rng),
            rounding=how,
            threads=torch.get_num_threads(),
        )

    return run


def perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    prepare_perturb_dense_(ws, coeff, rng, streams=streams, rounding=rounding)(coeff, rng)


def prepare_core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> Callable[[Tensor, Tensor], None]:
    items = args.cores(out, base, streams, mu)

    def run(coeff: Tensor, rng: Tensor) -> None:
        args.require().cpu.core_noise_(
            items=items,
            groups=coeff.shape[0],
            queries=args.queries(coeff, rng),
            threads=torch.get_num_threads(),
        )

    return run


def core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> None:
    prepare_core_noise_(out, base, coeff, rng, streams=streams, mu=mu)(coeff, rng)


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
    args.require().cpu.fold_(
        item=args.low_rank(w, u, v, stream),
        core=core.data_ptr(),
        decay=decay,
        rounding=args.rounding(rounding),
        rng=0 if rng is None else rng.data_ptr(),
        threads=torch.get_num_threads(),
    )


def add_noise_(
    y: Tensor, scale: Tensor, query: Tensor, rows: Tensor, rng: Tensor, *, stream: int
) -> None:
    args.require().cpu.add_noise_(
        args=args.add_noise(y, scale, query, rows, rng, stream), threads=torch.get_num_threads()
    )


def noise_outer_(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    rows: Tensor,
    rng: Tensor,
    *,
    stream: int,
    beta: float = 0.0,
) -> None:
    args.require().cpu.noise_outer_(
        args=args.noise_outer(out, weight, a, rows, rng, stream, beta),
        threads=torch.get_num_threads(),
    )


def _tail(rows: Tensor, u: Tensor, v: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """(x V) C_g^T as (rows, r), and U^T, both fp32: their product is the tail."""
    inner = (rows.float() @ v.float()).view(core.shape[0], -1, core.shape[1])
    return torch.bmm(inner, core.mT).view(-1, core.shape[1]), u.float().T


def _add_bias(y: Tensor, bias: Tensor | None) -> None:
    """y (G rows, m) += bias, (m,) or (G, m)."""
    if bias is not None:
        y.view(bias.numel() // bias.shape[-1], -1, bias.shape[-1]).add_(
            bias.reshape(-1, 1, bias.shape[-1])
        )


@_exact_products
def lowrank_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    shape = (*x.shape[:-1], w.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    if not rows.numel():
        return x.new_empty(shape)
    inner, tail = _tail(rows, u, v, core)
    if w.dtype == torch.float32:
        shared = bias is not None and bias.dim() == 1 and bias.dtype == w.dtype
        y = linear(rows, w, bias if shared else None)
        y.addmm_(inner, tail)
        if not shared:
            _add_bias(y, bias)
        return y.view(shape)
    # A 16-bit GEMM rounds its result, and adding the tail would round again. Blocks of W go through
    # fp32 instead, so that the sum is rounded once.
    y = torch.empty(rows.shape[0], w.shape[0], dtype=w.dtype)
    wide = rows.float()
    step = max(1, _BLOCK_ELEMENTS // w.shape[1])
    for start in range(0, w.shape[0], step):
        part = slice(start, start + step)
        block = linear(wide, w[part].float())
        block.addmm_(inner, tail[:, part])
        _add_bias(block, None if bias is None else bias[..., part])
        y[:, part] = block
    return y.view(shape)


@_exact_products
def lowrank_embedding(ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    groups, rank = core.shape[0], core.shape[1]
    flat = ids.reshape(-1)
    inner = embedding(flat, u).float().view(groups, flat.numel() // groups, rank)
    inner = torch.bmm(inner, core).view(-1, rank)
    rows = embedding(flat, w).float()
    rows.addmm_(inner, v.float().T)
    return rows.to(w.dtype).view(*ids.shape, w.shape[1])
