"""lowrank_linear as torch's GEMMs: one with W as it lies there, a skinny one and the rank-r tail.

fp32 products are TF32 where torch's own flag allows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch 2.8 gave mm a result wider than its factors.
_WIDE_MM = "dtype" in torch.ops.aten.mm.overloads()


def _thin_product(rows: Tensor, basis: Tensor) -> Tensor:
    """x V in fp32."""
    if rows.dtype == torch.float32:
        return rows @ basis.float()
    if _WIDE_MM and rows.is_cuda:
        return torch.mm(rows, basis.to(rows.dtype), out_dtype=torch.float32)
    return (rows @ basis.to(rows.dtype)).float()


def lowrank_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    shape = (*x.shape[:-1], w.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    if not rows.numel():
        return x.new_empty(shape)
    groups, rank = core.shape[:2]
    inner = _thin_product(rows, v).view(groups, -1, rank)
    inner = torch.bmm(inner, core.mT).view(-1, rank)
    if x.dtype == torch.float32 and bias is not None and bias.dim() == 1:
        y = torch.addmm(bias, rows, w.T)
        y.addmm_(inner, u.float().T)
        return y.view(shape)
    # The tail first: what 16 bits round of it is less than what they would of x W^T.
    y = inner.to(x.dtype) @ u.to(x.dtype).T
    y.addmm_(rows, w.T)
    if bias is not None:  # last, in fp32, as it may be much larger
        y.view(bias.numel() // bias.shape[-1], -1, bias.shape[-1]).add_(
            bias.reshape(-1, 1, bias.shape[-1])
        )
    return y.view(shape)
