"""grouped_norm: layer and RMS norms whose weight and bias are a group's own."""

import triton
import triton.language as tl

from .common import round_nearest


@triton.jit(do_not_specialize=["rows", "runs", "weight_stride", "bias_stride", "eps"])
def norm_kernel(
    out, x, weight, bias, rows, n, x_stride, weight_stride, bias_stride, eps, runs,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (group, run of RUN of its rows), group * runs + run; a row lies in registers whole.

    The variance is of the differences from the mean, in fp32. A run finds the group's weights in
    the multiprocessor's own cache from its second row on.
    """
    group = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * RUN
    column = tl.arange(0, BLOCK)
    inside = column < n
    for i in range(RUN):
        if first + i < rows:
            row = group * rows + (first + i)
            value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                value = tl.where(inside, value - tl.sum(value) / n, 0.0)
            value *= 1.0 / tl.sqrt_rn(tl.sum(value * value) / n + eps)
            if WEIGHT:
                at = weight + group * weight_stride + column
                value *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                at = bias + group * bias_stride + column
                value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            new = round_nearest(value, out.dtype.element_ty)
            tl.store(out + row * n + column, new, mask=inside)
