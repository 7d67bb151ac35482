"""philox4x32, normal_, perturb_dense_, core_noise_ and add_noise_."""

import triton
import triton.language as tl

from .common import find, round_nearest, run_places
from .philox import (
    block_words,
    interleave,
    interleave_pairs,
    noise_source,
    normals_of_words,
    philox4x32_10,
    round_stochastic,
    rounding_stream,
    run_all_words,
    run_normals,
    run_words,
)


@triton.jit(do_not_specialize=["count"])
def philox4x32_kernel(counter, key, words, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at = counter + 4 * index
    w0, w1, w2, w3 = philox4x32_10(
        tl.load(at, mask=inside, other=0).to(tl.uint32),
        tl.load(at + 1, mask=inside, other=0).to(tl.uint32),
        tl.load(at + 2, mask=inside, other=0).to(tl.uint32),
        tl.load(at + 3, mask=inside, other=0).to(tl.uint32),
        tl.load(key).to(tl.uint32),
        tl.load(key + 1).to(tl.uint32),
    )
    to = words + 4 * index
    tl.store(to, w0.to(tl.int64), mask=inside)
    tl.store(to + 1, w1.to(tl.int64), mask=inside)
    tl.store(to + 2, w2.to(tl.int64), mask=inside)
    tl.store(to + 3, w3.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["count", "columns", "stride", "stream"])
def normal_kernel(
    out, rng, count, columns, stride, stream,
    FLAT: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program fills VEC N elements."""
    BLOCK: tl.constexpr = VEC * N
    first = tl.program_id(0).to(tl.int64) * BLOCK
    key0, key1, stream_, draw = noise_source(rng, stream, 0)
    z = run_normals(key0, key1, stream_, draw, first // 4, N, VEC)
    at, inside = run_places(out, first, count, columns, stride, BLOCK, VEC, FLAT, ALIGNED)
    tl.store(at, round_nearest(z, out.dtype.element_ty), mask=inside)


@triton.jit
def _add_normals(c, key0, key1, stream, draw, quad, offset, s0, s1, s2, s3):
    w0, w1, w2, w3 = run_words(key0, key1, stream, draw, quad, offset)
    z0, z1, z2, z3 = normals_of_words(w0, w1, w2, w3)
    return tl.fma(z0, c, s0), tl.fma(z1, c, s1), tl.fma(z2, c, s2), tl.fma(z3, c, s3)


@triton.jit
def _queries_sum(coeff, queries, rng, stream, quad, N: tl.constexpr, VEC: tl.constexpr):
    """sum_k coeff[k] z_(draw + k) of the VEC N elements from block ``quad``; zeros are not drawn.

    Summed as the quads' elements: one block of sums would lie across the threads otherwise.
    """
    s0 = tl.zeros((N,), tl.float32)
    s1, s2, s3 = s0, s0, s0
    t0, t1, t2, t3 = s0, s0, s0, s0
    even = VEC // 4 * tl.arange(0, N)
    for k in range(queries):
        c = tl.load(coeff + k)
        if c != 0.0:
            key0, key1, id, draw = noise_source(rng, stream, k)
            s0, s1, s2, s3 = _add_normals(c, key0, key1, id, draw, quad, even, s0, s1, s2, s3)
            if VEC == 8:
                odd = even + 1
                t0, t1, t2, t3 = _add_normals(c, key0, key1, id, draw, quad, odd, t0, t1, t2, t3)
    if VEC == 4:
        return interleave(s0, s1, s2, s3)
    else:
        return interleave_pairs(s0, s1, s2, s3, t0, t1, t2, t3)


@triton.jit(do_not_specialize=["tensors", "queries"])
def perturb_dense_kernel(
    table, firsts, tensors, coeff, queries, rng,
    DTYPE: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    VEC: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Table rows: address, elements, columns, stride, stream. A program does STEPS runs of one
    tensor, VEC N elements each."""
    BLOCK: tl.constexpr = VEC * N
    item = tl.program_id(0).to(tl.int64)
    index = find(firsts, tensors, item)
    entry = table + 5 * index
    w = tl.load(entry).to(tl.pointer_type(DTYPE), bitcast=True)
    count = tl.load(entry + 1)
    columns = tl.load(entry + 2)
    stride = tl.load(entry + 3)
    stream = tl.load(entry + 4)
    start = (item - tl.load(firsts + index)) * (STEPS * BLOCK)
    for step in range(STEPS):
        first = start + step * BLOCK
        if first < count:
            at, inside = run_places(w, first, count, columns, stride, BLOCK, VEC, FLAT, ALIGNED)
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            value += _queries_sum(coeff, queries, rng, stream, first // 4, N, VEC)
            if STOCHASTIC:
                key0, key1, stream_, draw = noise_source(rng, rounding_stream(stream), 0)
                word = run_all_words(key0, key1, stream_, draw, first // 4, N, VEC)
                new = round_stochastic(value, word, DTYPE)
            else:
                new = round_nearest(value, DTYPE)
            tl.store(at, new, mask=inside)


@triton.jit(do_not_specialize=["queries", "first_group"])
def core_noise_kernel(
    table, scratch, coeff, queries, rng, first_group,
    FIELDS: tl.constexpr, SCRATCH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (matrix, run of 4 N elements, group from first_group on).

    Table rows begin with rank, stream and mu's bits; then come the addresses of out and base or,
    with SCRATCH, an offset into ``scratch`` and no base.
    """
    entry = table + FIELDS * tl.program_id(0).to(tl.int64)
    rank = tl.load(entry)
    size = rank * rank
    first = tl.program_id(1).to(tl.int64) * (4 * N)
    if first < size:
        stream = tl.load(entry + 1)
        mu = tl.load(entry + 2).to(tl.int32).to(tl.float32, bitcast=True)
        group = tl.program_id(2).to(tl.int64) + first_group
        offset = first + tl.arange(0, 4 * N)
        inside = offset < size
        z = _queries_sum(coeff + group * queries, queries, rng, stream, first // 4, N, 4)
        if SCRATCH:
            tl.store(scratch + (tl.load(entry + 3) + offset), mu * z, mask=inside)
        else:
            out = tl.load(entry + 3).to(tl.pointer_type(tl.float32), bitcast=True) + group * size
            base = tl.load(entry + 4).to(tl.pointer_type(tl.float32), bitcast=True)
            old = tl.load(base + offset, mask=inside, other=0.0)
            tl.store(out + offset, tl.fma(z, mu, old), mask=inside)


@triton.jit(do_not_specialize=["queries", "size", "stream", "mu"])
def core_kernel(out, coeff, queries, rng, size, stream, mu, N: tl.constexpr):
    """out = mu sum_k coeff[k] Z_(draw + k) of one matrix, ``size`` elements."""
    first = tl.program_id(0).to(tl.int64) * (4 * N)
    offset = first + tl.arange(0, 4 * N)
    z = _queries_sum(coeff, queries, rng, stream, first // 4, N, 4)
    tl.store(out + offset, mu * z, mask=offset < size)


@triton.jit(
    do_not_specialize=["rows", "columns", "group_stride", "row_stride", "stream", "run", "runs"]
)
def add_noise_kernel(
    y, scale, query, index, rng, rows, columns, group_stride, row_stride, stream, run, runs,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (one of a group's ``runs`` of ``run`` rows, run of VEC N columns to begin with).

    ALIGNED: rows begin at multiples of 16 bytes of y and with a block of the generator, and end so.
    Otherwise the first element of a row is number ``skip`` of its block: column c is element
    c + skip of the blocks from that one on, and what lies before the row is masked.
    """
    BLOCK: tl.constexpr = VEC * N
    group = (tl.program_id(0) // runs).to(tl.int64)
    first_row = (tl.program_id(0) % runs).to(tl.int64) * run
    key0, key1, stream_, draw = noise_source(rng, stream, tl.load(query + group))
    for i in range(run):
        row = first_row + i
        if row < rows:
            s = tl.load(scale + group * rows + row)
            if s != 0.0:
                element = tl.load(index + row) * columns
                skip = 0 if ALIGNED else (element & 3).to(tl.int32)
                line = y + (group * group_stride + row * row_stride)
                reach = columns + skip
                for start in range(tl.program_id(1) * BLOCK, reach, tl.num_programs(1) * BLOCK):
                    z = _row_normals(key0, key1, stream_, draw, (element >> 2) + start // 4, N, VEC)
                    column = start + tl.arange(0, BLOCK)
                    left = reach - start
                    if ALIGNED:
                        at = tl.multiple_of(line + column, 16)
                        inside = tl.arange(0, BLOCK) < tl.multiple_of(tl.minimum(left, BLOCK), VEC)
                    else:
                        at = line + (column - skip)
                        inside = (tl.arange(0, BLOCK) < left) & (column >= skip)
                    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                    new = round_nearest(tl.fma(z, s, value), y.dtype.element_ty)
                    tl.store(at, new, mask=inside)


@triton.jit
def _row_normals(key0, key1, stream, draw, block, N: tl.constexpr, VEC: tl.constexpr):
    """As run_normals, from any block on."""
    even = block + VEC // 4 * tl.arange(0, N)
    w0, w1, w2, w3 = block_words(key0, key1, stream, draw, even)
    z0, z1, z2, z3 = normals_of_words(w0, w1, w2, w3)
    if VEC == 4:
        return interleave(z0, z1, z2, z3)
    else:
        w0, w1, w2, w3 = block_words(key0, key1, stream, draw, even + 1)
        y0, y1, y2, y3 = normals_of_words(w0, w1, w2, w3)
        return interleave_pairs(z0, z1, z2, z3, y0, y1, y2, y3)
