"""The native module, and tensors as the structs of its launch API (csrc/lowrank.h)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

native: Any = None
why_missing = ""

try:
    native = importlib.import_module("subzero_kernels._native")
except ImportError as error:
    why_missing = (
        f"the native module does not import ({error}): build it with `pip install .` "
        "(in a checkout `pip install -e .`), which needs a C++17 compiler"
    )

_dtypes: dict[torch.dtype, Any] = {}
if native is not None:
    _dtypes = {
        torch.float32: native.Dtype.float32,
        torch.bfloat16: native.Dtype.bfloat16,
        torch.float16: native.Dtype.float16,
    }


def require() -> Any:
    """The native module.

    Raises:
        RuntimeError: it is missing; the message says how to build it.
    """
    if native is None:
        raise RuntimeError(why_missing)
    return native


def matrix(tensor: Tensor) -> Any:
    """A tensor as native.Matrix: one row if it is contiguous, else its rows."""
    if tensor.is_contiguous():
        rows, columns = 1, tensor.numel()
        stride = columns
    else:
        rows, columns = tensor.shape
        stride = tensor.stride(0)
    return require().Matrix(
        data=tensor.data_ptr(),
        rows=rows,
        columns=columns,
        stride=stride,
        dtype=_dtypes[tensor.dtype],
    )


def rows(tensor: Tensor) -> Any:
    """A (rows, columns) tensor with contiguous rows as native.Matrix of that very shape."""
    count, columns = tensor.shape
    return require().Matrix(
        data=tensor.data_ptr(),
        rows=count,
        columns=columns,
        stride=columns if count == 1 else tensor.stride(0),
        dtype=_dtypes[tensor.dtype],
    )


def low_rank(w: Tensor, u: Tensor, v: Tensor, stream: int) -> Any:
    return require().LowRank(w=matrix(w), u=rows(u), v=rows(v), stream=stream)


def queries(coeff: Tensor, rng: Tensor) -> Any:
    return require().Queries(coeff=coeff.data_ptr(), count=coeff.shape[-1], rng=rng.data_ptr())


def dense(ws: Sequence[Tensor], streams: Sequence[int]) -> list[Any]:
    native = require()
    return [native.Dense(w=matrix(w), stream=s) for w, s in zip(ws, streams, strict=True)]


def cores(
    out: Sequence[Tensor], base: Sequence[Tensor], streams: Sequence[int], mu: Sequence[float]
) -> list[Any]:
    native = require()
    return [
        native.Core(
            out=group.data_ptr(),
            base=start.data_ptr(),
            rank=start.shape[0],
            stream=stream,
            mu=scale,
        )
        for group, start, stream, scale in zip(out, base, streams, mu, strict=True)
    ]


def add_noise(
    y: Tensor, scale: Tensor, query: Tensor, row: Tensor, rng: Tensor, stream: int
) -> Any:
    groups, count, columns = y.shape
    return require().AddNoise(
        y=require().Slabs(
            data=y.data_ptr(),
            groups=groups,
            rows=count,
            columns=columns,
            group_stride=y.stride(0),
            row_stride=y.stride(1),
            dtype=_dtypes[y.dtype],
        ),
        scale=scale.data_ptr(),
        query=query.data_ptr(),
        row=row.data_ptr(),
        rng=rng.data_ptr(),
        stream=stream,
    )


def noise_outer(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    row: Tensor,
    rng: Tensor,
    stream: int,
    beta: float,
) -> Any:
    native = require()
    return native.NoiseOuter(
        out=rows(out),
        a=rows(a),
        queries=native.Queries(coeff=weight.data_ptr(), count=weight.shape[0], rng=rng.data_ptr()),
        row=row.data_ptr(),
        stream=stream,
        beta=beta,
    )


def lowrank_embedding(
    ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor, out: Tensor
) -> Any:
    groups = core.shape[0]
    return require().LowRankEmbedding(
        ids=ids.data_ptr(),
        ids_wide=ids.dtype == torch.int64,
        groups=groups,
        tokens=ids.numel() // groups,
        w=rows(w),
        u=rows(u),
        v=rows(v),
        core=core.data_ptr(),
        out=out.data_ptr(),
    )


def _bias(bias: Tensor | None, w: Tensor) -> Any:
    if bias is not None:
        return rows(bias if bias.dim() == 2 else bias[None])
    return require().Matrix(data=0, rows=0, columns=w.shape[0], stride=0, dtype=_dtypes[w.dtype])


def lowrank_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    scratch: Tensor,
    y: Tensor,
) -> Any:
    return require().LowRankLinear(
        x=rows(x),
        w=rows(w),
        bias=_bias(bias, w),
        u=rows(u),
        v=rows(v),
        core=core.data_ptr(),
        groups=core.shape[0],
        scratch=scratch.data_ptr(),
        y=y.data_ptr(),
    )


def rounding(name: str) -> Any:
    return getattr(require().Rounding, name)
