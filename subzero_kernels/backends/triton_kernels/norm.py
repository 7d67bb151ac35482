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

    The variance is of the differences from the mean, in fp32. A run reads the group's weights once,
    and each row while the one before it is worked on.
    """
    group = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * RUN
    column = tl.arange(0, BLOCK)
    inside = column < n
    row = group * rows + first
    coming = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    weight += group * weight_stride + column
    bias += group * bias_stride + column
    if WEIGHT and RUN > 1:
        factor = tl.load(weight, mask=inside, other=0.0)
    if BIAS and RUN > 1:
        shift = tl.load(bias, mask=inside, other=0.0)
    for i in range(1 if RUN == 1 else min(RUN, rows - first)):
        value = coming.to(tl.float32)
        if RUN > 1:
            more = inside & (i + 1 < RUN) & (first + i + 1 < rows)
            coming = tl.load(x + (row + i + 1) * x_stride + column, mask=more, other=0.0)
        if CENTRED:
            value = tl.where(inside, value - tl.sum(value) / n, 0.0)
        value *= 1.0 / tl.sqrt_rn(tl.sum(value * value) / n + eps)
        if WEIGHT:
            if RUN == 1:
                factor = tl.load(weight, mask=inside, other=0.0)
            value *= factor.to(tl.float32)
        if BIAS:
            if RUN == 1:
                shift = tl.load(bias, mask=inside, other=0.0)
            value += shift.to(tl.float32)
        new = round_nearest(value, out.dtype.element_ty)
        tl.store(out + (row + i) * n + column, new, mask=inside)
