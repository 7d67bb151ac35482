"""Data for tests of the ops, and the contract's error bound."""

from __future__ import annotations

import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (7, 129, 7), (129, 7, 3), (129, 1151, 16), (1151, 1, 1), (96, 64, 33)]


def c_of(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-3


def assert_close(got: torch.Tensor, exact: torch.Tensor, added: torch.Tensor) -> None:
    """1.1 times the store's own rounding plus c times the norm of what is added."""
    store = (exact.to(got.dtype).double() - exact).norm()
    error = (got.cpu().double() - exact).norm()
    assert error <= 1.1 * store + c_of(got.dtype) * added.norm()
    assert got.isfinite().all()


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0].to(dtype).contiguous()
        for size in (rows, columns)
    ]


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cpu().double() for tensor in tensors]


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def linear_case(rows, columns, rank, groups, dtype):
    w = torch.randn(rows, columns).to(dtype) / math.sqrt(columns)
    u, v = factors(rows, columns, rank, dtype)
    return w, u, v, torch.randn(groups, rank, rank)
