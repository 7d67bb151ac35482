"""Norms at a group's own weights and biases, which are fp32: the output is rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subzero_kernels import grouped_norm

_NATIVE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normed(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> Tensor:
    """Layer norm if ``centred``, else RMS norm: n(x) * weight + bias in x's dtype.

    Args:
        x: (rows, ..., *shape), its leading axis one or more equal groups.
        weight, bias: None, ``shape`` or (groups, n).
    """
    if _native(x, shape, weight) and _native(x, shape, bias):
        return grouped_norm(x, weight, bias, eps, centred=centred)
    # between steps a user may differentiate through the model
    wide = x if x.dtype == torch.float64 else x.float()
    out = F.layer_norm(wide, shape, eps=eps) if centred else F.rms_norm(wide, shape, eps=eps)
    if weight is not None:
        out = out * _over(weight, x, shape)
    if bias is not None:
        out = out + _over(bias, x, shape)
    return out.to(x.dtype)


def scaled(x: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, ..., n) times values (groups, n), as wide as the parameter's ``dtype`` and x are."""
    dtype = torch.promote_types(dtype, x.dtype)
    grouped, factors = x.reshape(len(values), -1, x.shape[-1]), values[:, None]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (grouped * factors).to(dtype).view(x.shape)
    out = torch.empty(grouped.shape, dtype=dtype, device=x.device)
    return torch.mul(grouped, factors, out=out).view(x.shape)  # one kernel, which also rounds


def _native(x: Tensor, shape: tuple[int, ...], value: Tensor | None) -> bool:
    """Whether the op takes this: nothing to differentiate, one axis, a dtype that goes with x's."""
    if torch.is_grad_enabled() or len(shape) != 1 or x.dtype not in _NATIVE:
        return False
    return value is None or value.dtype in (x.dtype, torch.float32)


def _over(value: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``value`` for broadcasting over x: as it is, or repeated for the rows of each group."""
    if tuple(value.shape) == shape:
        return value
    rows = value.repeat_interleave(x.shape[0] // len(value), 0)
    return rows.view(x.shape[0], *[1] * (x.dim() - 1 - len(shape)), *shape)
