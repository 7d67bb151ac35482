"""noise_outer_: out = beta out + sum_k sum_i weight[k, i] z_(draw + k)[rows[i]]^T a[i].

A program makes the weighted noise of BC columns, block after block of BN rows, and multiplies it
with A there: out^T = A^T noise on the tensor cores, in bf16 halves. Where the columns alone do not
fill the GPU, the rows are split into a number of parts that depends on the shapes only; their sums
lie in scratch and are added in order.
"""

import triton
import triton.language as tl

from .common import dot, split
from .philox import (
    block_words,
    interleave_rows,
    noise_source,
    normal_of_element,
    normals_of_words,
)


@triton.jit
def _weighted_noise(
    weight, index, rng, queries, count, columns, stream, i, first_column,
    BN: tl.constexpr, BC: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """sum_k weight[k, i] z_(draw + k)[rows[i]] of BC columns: (BN, BC). Rows past the end are 0."""
    inside = i < count
    element = (tl.load(index + i, mask=inside, other=0) * columns + first_column)[:, None]
    if QUADS:  # columns, and so the elements that rows begin with, are multiples of 4
        block = (element >> 2) + tl.arange(0, BC // 4)[None, :]
        s0 = tl.zeros((BN, BC // 4), tl.float32)
        s1, s2, s3 = s0, s0, s0
        for k in range(queries):
            c = tl.load(weight + k * count + i, mask=inside, other=0.0)[:, None]
            key0, key1, stream_, draw = noise_source(rng, stream, k)
            w0, w1, w2, w3 = block_words(key0, key1, stream_, draw, block)
            z0, z1, z2, z3 = normals_of_words(w0, w1, w2, w3)
            s0 = tl.fma(z0, c.broadcast_to(BN, BC // 4), s0)
            s1 = tl.fma(z1, c.broadcast_to(BN, BC // 4), s1)
            s2 = tl.fma(z2, c.broadcast_to(BN, BC // 4), s2)
            s3 = tl.fma(z3, c.broadcast_to(BN, BC // 4), s3)
        return interleave_rows(s0, s1, s2, s3)
    else:
        element += tl.arange(0, BC)[None, :]
        total = tl.zeros((BN, BC), tl.float32)
        for k in range(queries):
            c = tl.load(weight + k * count + i, mask=inside, other=0.0)[:, None]
            key0, key1, stream_, draw = noise_source(rng, stream, k)
            z = normal_of_element(key0, key1, stream_, draw, element)
            total = tl.fma(z, c.broadcast_to(BN, BC), total)
        return total


@triton.jit(
    do_not_specialize=[
        "queries",
        "count",
        "columns",
        "width",
        "a_stride",
        "out_stride",
        "stream",
        "part",
        "beta",
        "beta_low",
    ]  # fmt: skip
)
def noise_outer_kernel(
    out, scratch, weight, a, index, rng, queries, count, columns, width, a_stride, out_stride,
    stream, part, beta, beta_low,
    R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, QUADS: tl.constexpr,
    SPLIT: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Program (BC columns, ``part`` rows). SPLIT: its sum goes to scratch (parts, columns, R)."""
    first_column = tl.program_id(0) * BC
    first = tl.program_id(1) * part
    r = tl.arange(0, R)
    sum_ = tl.zeros((R, BC), tl.float32)
    for start in tl.range(first, tl.minimum(first + part, count), BN):
        i = start + tl.arange(0, BN)
        held = (i < count)[None, :] & (r < width)[:, None]
        rows = tl.load(a + i.to(tl.int64)[None, :] * a_stride + r[:, None], mask=held, other=0.0)
        noise = _weighted_noise(
            weight, index, rng, queries, count, columns, stream, i, first_column, BN, BC, QUADS
        )
        high, low = split(noise)
        if a.dtype.element_ty == tl.bfloat16:
            sum_ = dot(rows, low, sum_)
            sum_ = dot(rows, high, sum_)
        else:
            rows_high, rows_low = split(rows.to(tl.float32))
            sum_ = dot(rows_high, low, sum_)
            sum_ = dot(rows_low, high, sum_)
            sum_ = dot(rows_high, high, sum_)
    column = (first_column + tl.arange(0, BC))[None, :].to(tl.int64)
    inside = (column < columns) & (r < width)[:, None]
    if SPLIT:
        at = scratch + (tl.program_id(1).to(tl.int64) * columns + column) * width + r[:, None]
        tl.store(at, sum_, mask=inside)
    else:
        at = out + column * out_stride + r[:, None]
        if BETA:
            old = tl.load(at, mask=inside, other=0.0)
            sum_ = tl.fma(old, beta, tl.fma(old, beta_low, sum_))
        tl.store(at, sum_, mask=inside)


@triton.jit(
    do_not_specialize=["size", "width", "out_stride", "parts", "beta", "beta_low"],
)
def add_parts_kernel(
    out, scratch, size, width, out_stride, parts, beta, beta_low,
    BLOCK: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """out = beta out + the parts in scratch, added in order."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(scratch + part * size + element, mask=inside, other=0.0)
    row = element // width
    at = out + row * out_stride + (element - row * width)
    if BETA:
        old = tl.load(at, mask=inside, other=0.0)
        total = tl.fma(old, beta, tl.fma(old, beta_low, total))
    tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["queries", "count", "rows", "columns", "stream"])
def noise_sum_kernel(
    out, weight, index, rng, queries, count, rows, columns, stream,
    BN: tl.constexpr, BC: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """The weighted noise of ``rows`` of the ``count`` rows themselves, (rows, columns) fp32.

    For wide A, where making the noise again for each block of its columns would take longer than
    writing it. ``weight`` and ``index`` begin at the first of the rows.
    """
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    first_column = tl.program_id(1) * BC
    # Rows past the last of ``rows`` are made of what comes next, in bounds, and are not stored.
    noise = _weighted_noise(
        weight, index, rng, queries, count, columns, stream, i, first_column, BN, BC, QUADS
    )
    column = first_column + tl.arange(0, BC)[None, :]
    at = out + i.to(tl.int64)[:, None] * columns + column
    tl.store(at, noise, mask=(i < rows)[:, None] & (column < columns))
