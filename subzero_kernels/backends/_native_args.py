"""The native module, and tensors as the structs of its launch API (csrc/lowrank.h)."""

from __future__ import annotations

import importlib
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


def factor(tensor: Tensor) -> Any:
    """A basis (rows, rank) as native.Matrix."""
    rows, rank = tensor.shape
    return require().Matrix(
        data=tensor.data_ptr(),
        rows=rows,
        columns=rank,
        stride=rank if rows == 1 else tensor.stride(0),
        dtype=_dtypes[tensor.dtype],
    )


def low_rank(w: Tensor, u: Tensor, v: Tensor, stream: int) -> Any:
    return require().LowRank(w=matrix(w), u=factor(u), v=factor(v), stream=stream)


def queries(coeff: Tensor, rng: Tensor) -> Any:
    return require().Queries(coeff=coeff.data_ptr(), count=coeff.shape[-1], rng=rng.data_ptr())


def rounding(name: str) -> Any:
    return getattr(require().Rounding, name)
