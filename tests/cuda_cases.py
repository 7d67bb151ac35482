"""Matrices on the GPU for tests of the CUDA perturb_ and fold_, and their float64 oracle.

The oracle is the reference backend on float64 weights: the same noise, exact products.
"""

from __future__ import annotations

import torch
from op_cases import c_of

from subzero_kernels.backends import reference
from subzero_kernels.rng import make_rng

KINDS = {  # W, bases
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}


def basis(rows: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Orthonormal columns, quickly."""
    q = torch.linalg.qr(torch.randn(rows, rank, device="cuda"))[0]
    return q.to(dtype).contiguous()


def case(rows: int, columns: int, rank: int, kind: str, scale: float = 1.0):
    weight, bases = KINDS[kind]
    w = (scale * torch.randn(rows, columns, device="cuda")).to(weight)
    return w, basis(rows, rank, bases), basis(columns, rank, bases)


def arguments(*coeff: float, seed: int = 3, draw: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(coeff, device="cuda"), make_rng(seed, draw, "cuda")


def oracle(w, u, v, coeff, rng, stream) -> tuple[torch.Tensor, torch.Tensor]:
    """What perturb_ gives in float64, and what it adds."""
    before = w.double().contiguous()
    after = before.clone()
    reference.perturb_(after, u.double(), v.double(), coeff, rng, stream=stream)
    return after, after - before


def close(got: torch.Tensor, exact: torch.Tensor, added: torch.Tensor) -> None:
    """Within the contract's bound."""
    store = (exact.to(got.dtype).double() - exact).norm()
    error = (got.double() - exact).norm()
    assert error <= 1.1 * store + c_of(got.dtype) * added.norm()
    assert got.isfinite().all()
