"""What several kernels share: products in halves, items of a table, elements of rows in memory."""

import os

import triton
import triton.language as tl

# Triton decides when a kernel is decorated, from the same variable.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"))


@triton.jit
def dot(a, b, sum_):
    """sum_ + a b on the tensor cores; the interpreter takes bf16 numbers for integers."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_)
    else:
        return tl.dot(a, b, sum_)


@triton.jit
def round_nearest(x, dtype: tl.constexpr):
    """fp32 to ``dtype``; the interpreter cuts bf16 numbers off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def split(x):
    """fp32 as the sum of two bf16 numbers, to 16 bits."""
    high = round_nearest(x, tl.bfloat16)
    return high, round_nearest(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def find(firsts, count, item):
    """The entry that an item belongs to: the last one whose first item is not above it."""
    found = -1
    for start in range(0, count, 256):
        at = start + tl.arange(0, 256)
        first = tl.load(firsts + at, mask=at < count, other=0x7FFFFFFFFFFFFFFF)
        found += tl.sum((first <= item).to(tl.int32))
    return found


@triton.jit
def at_most(count, limit: tl.constexpr):
    """What is left of an int64 count, as an int32 that is no more than a block needs."""
    return tl.minimum(count, limit).to(tl.int32)


@triton.jit
def run_places(
    start, first, count, columns, stride,
    BLOCK: tl.constexpr, VEC: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Addresses and mask of elements first .. first + BLOCK of a matrix of ``count`` elements.

    FLAT: its rows follow each other. ALIGNED: it begins at a multiple of 16 bytes and ``count`` is
    one of VEC. The hints are given to results of operations that cannot be folded: those given to
    an argument, or to the result of a function, are lost when functions are inlined.
    """
    offset = tl.arange(0, BLOCK)
    left = at_most(count - first, BLOCK)
    if FLAT:
        at = (start + first) + offset
    else:
        element = first + offset
        row = element // columns
        at = start + (row * stride + (element - row * columns))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
        left = tl.multiple_of(tl.minimum(left, BLOCK), VEC)
    return at, offset < left
