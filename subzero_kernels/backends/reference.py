"""The ops in plain torch on any device: the definition that native backends are tested against.

16-bit and fp32 weights are accumulated in fp32 and rounded once at the store; float64 weights stay
in float64 throughout, except for the noise and mu, which are the contract's fp32 values.
Weight-sized temporaries are made freely: this is not the fast path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, rms_norm

from ..rng import normals, philox, round_stochastic, rounding_stream, row_normals, words

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

_Op = TypeVar("_Op", bound=Callable[..., Any])


def available() -> tuple[bool, str]:
    return True, "plain torch runs everywhere"


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever the user chose: TF32's error of 3e-4 is above the ops' bound.

    torch 2.9 gave each library its own setting and refuses to mix the two ways of reading it.
    """
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        libraries = [backends.cuda.matmul, backends.mkldnn.matmul]
        before = [library.fp32_precision for library in libraries]
        for library in libraries:
            library.fp32_precision = "ieee"
        try:
            yield
        finally:
            for library, setting in zip(libraries, before, strict=True):
                library.fp32_precision = setting
    else:
        setting = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(setting)


def _exact_products(op: _Op) -> _Op:
    @functools.wraps(op)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with full_precision():
            return op(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which a weight of this dtype is accumulated."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _round_to_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32, device="cpu").item()


def _scale(u: Tensor, v: Tensor) -> float:
    """mu = sqrt(m' n') / r, computed in float64, then fp32."""
    return _round_to_float32(math.sqrt(u.shape[0] * v.shape[0]) / u.shape[1])


def _noise(like: Tensor, coeff: Tensor, rng: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """sum_k coeff[k] z_(draw + k) in the shape of ``like``."""
    total = torch.zeros(like.shape, dtype=dtype, device=like.device)
    for k in range(coeff.shape[0]):
        z = normals(rng, stream, like.numel(), draw_offset=k).view(like.shape)
        total += coeff[k].to(dtype) * z.to(dtype)
    return total


def _product(u: Tensor, core: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """U C V^T, (m', n')."""
    return u.to(dtype) @ core.to(dtype) @ v.to(dtype).T


def _store(w: Tensor, value: Tensor, rounding: str, rng: Tensor | None, stream: int) -> None:
    """Write ``value``, of w's shape in the accumulation dtype, into w with one rounding."""
    if rounding == "stochastic" and w.dtype in (torch.bfloat16, torch.float16):
        assert rng is not None
        word = words(rng, rounding_stream(stream), w.numel()).view(w.shape)
        value = round_stochastic(value, word, w.dtype)
    w.copy_(value)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    return philox(counter, key)


def normal_(out: Tensor, rng: Tensor, stream: int) -> None:
    out.copy_(normals(rng, stream, out.numel()).view(out.shape))


@_exact_products
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
    dtype = _wide(w)
    core = _scale(u, v) * _noise(u.new_empty(u.shape[1], u.shape[1]), coeff, rng, stream, dtype)
    _store(w, w.to(dtype) + _product(u, core, v, dtype).reshape(w.shape), rounding, rng, stream)


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
    for w, u, v, stream in zip(ws, us, vs, streams, strict=True):
        perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)


def perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    for w, stream in zip(ws, streams, strict=True):
        dtype = _wide(w)
        _store(w, w.to(dtype) + _noise(w, coeff, rng, stream, dtype), rounding, rng, stream)


def core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> None:
    for cores, start, stream, scale in zip(out, base, streams, mu, strict=True):
        noise = torch.stack([_noise(start, row, rng, stream, cores.dtype) for row in coeff])
        cores.copy_(start + _round_to_float32(scale) * noise)


@_exact_products
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
    dtype = _wide(w)
    value = decay * w.to(dtype) + _product(u, core, v, dtype).reshape(w.shape)
    _store(w, value, rounding, rng, stream)


def add_noise_(
    y: Tensor, scale: Tensor, query: Tensor, rows: Tensor, rng: Tensor, *, stream: int
) -> None:
    dtype = _wide(y)
    for group, scales, offset in zip(y, scale[..., None], query, strict=True):
        z = row_normals(rng, stream, rows, y.shape[2], draw_offset=offset)
        value = group.to(dtype) + scales.to(dtype) * z.to(dtype)
        # Adding zero would turn -0.0 into 0.0.
        group.copy_(torch.where(scales == 0, group, value.to(y.dtype)))


# Rows whose noise is made at a time.
_NOISE_ROWS = 1024


@_exact_products
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
    dtype = _wide(out)
    total = torch.zeros(out.shape, dtype=dtype, device=out.device)
    for start in range(0, rows.shape[0], _NOISE_ROWS):
        part = slice(start, start + _NOISE_ROWS)
        noise = torch.zeros(len(rows[part]), out.shape[0], dtype=dtype, device=out.device)
        for k, weights in enumerate(weight[:, part, None].to(dtype)):
            z = row_normals(rng, stream, rows[part], out.shape[0], draw_offset=k)
            noise += weights * z.to(dtype)
        total += noise.T @ a[part].to(dtype)
    out.copy_(total if beta == 0 else beta * out + total)


@_exact_products
def lowrank_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    dtype = _wide(w)
    groups = core.shape[0]
    columns = x.shape[-1]
    rows = x.to(dtype).reshape(groups, x.numel() // (groups * columns), columns)
    y = rows @ w.to(dtype).T
    y += rows @ v.to(dtype) @ core.to(dtype).mT @ u.to(dtype).T
    if bias is not None:
        y += bias.to(dtype).reshape(-1, 1, bias.shape[-1])
    return y.to(w.dtype).reshape(*x.shape[:-1], w.shape[0])


@_exact_products
def lowrank_embedding(ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    dtype = _wide(w)
    groups = core.shape[0]
    flat = ids.reshape(groups, ids.numel() // groups)
    rows = embedding(flat, w).to(dtype)
    rows = rows + embedding(flat, u).to(dtype) @ core.to(dtype) @ v.to(dtype).T
    return rows.to(w.dtype).reshape(*ids.shape, w.shape[1])


def grouped_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    wide = x.to(_wide(x))
    y = (
        layer_norm(wide, x.shape[-1:], eps=eps)
        if centred
        else rms_norm(wide, x.shape[-1:], eps=eps)
    )
    for value, apply in ((weight, torch.mul), (bias, torch.add)):
        if value is not None:
            own = value.reshape(-1, 1, x.shape[-1])  # one row a group, or one for all
            y = apply(y.reshape(len(own), -1, x.shape[-1]), own.to(y.dtype))
    return y.reshape(x.shape).to(x.dtype)
