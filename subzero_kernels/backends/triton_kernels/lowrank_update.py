"""W = decay W + U C V^T in one pass: the kernels of perturb_, perturb_many_ and fold_.

An item is a strip of BM rows times some tiles of columns. Each tile is a product of the strip with
a tile of V (strip.py), one read and one write of W.
"""

import triton
import triton.language as tl

from .common import at_most, find, round_nearest
from .philox import (
    block_words,
    interleave_rows,
    noise_source,
    round_stochastic,
    rounding_stream,
    word_of_element,
)
from .strip import strip_operands, strip_rows, tile_columns, tile_parts, tile_product


@triton.jit
def _part(
    w, row, row_inside, first_column, start, last, n, w_columns, w_stride,
    CW: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, W_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Addresses and mask of CW columns of a strip of the (m', n') matrix, from ``start`` on.

    ``start`` and ``last`` count from first_column. ROWS: the matrix's rows are W's own. Hints are
    given to results of operations that no start makes void: others are lost when a function is
    inlined or an operation is folded.
    """
    column = tl.arange(0, CW)[None, :]
    left = tl.minimum(last - start, CW)
    if ROWS:
        at = (w + (row * w_stride + (first_column + start))) + column
    else:
        element = row * n + (first_column + start) + column
        w_row = element // w_columns
        at = w + (w_row * w_stride + (element - w_row * w_columns))
    if W_ALIGNED:
        at = tl.multiple_of(at, (16, 16))
        left = tl.multiple_of(left, VEC)
    return at, row_inside & (column < left)


@triton.jit
def _load_pair(
    w, row, row_inside, first_column, start, last, n, w_columns, w_stride,
    CW: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, W_ALIGNED: tl.constexpr,
):  # fmt: skip
    at, inside = _part(
        w, row, row_inside, first_column, start, last, n, w_columns, w_stride,
        CW, VEC, ROWS, W_ALIGNED,
    )  # fmt: skip
    w0 = tl.load(at, mask=inside)
    at, inside = _part(
        w, row, row_inside, first_column, start + CW, last, n, w_columns, w_stride,
        CW, VEC, ROWS, W_ALIGNED,
    )  # fmt: skip
    return w0, tl.load(at, mask=inside)


@triton.jit
def _load_parts(
    w, row, row_inside, first_column, start, last, n, w_columns, w_stride,
    CW: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, W_ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """W's tile in parts, as tile_parts gives them."""
    w0, w1 = _load_pair(
        w, row, row_inside, first_column, start, last, n, w_columns, w_stride,
        CW, VEC, ROWS, W_ALIGNED,
    )  # fmt: skip
    w2, w3 = w0, w1
    if PARTS == 4:
        w2, w3 = _load_pair(
            w, row, row_inside, first_column, start + 2 * CW, last, n, w_columns, w_stride,
            CW, VEC, ROWS, W_ALIGNED,
        )  # fmt: skip
    return w0, w1, w2, w3


@triton.jit
def _store_part(
    part, y, w, row, row_inside, first_column, start, last, n, w_columns, w_stride, rng, stream,
    decay, decay_low,
    DTYPE: tl.constexpr, CW: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    W_ALIGNED: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    value = part.to(tl.float32)
    if DECAY:
        value = tl.fma(value, decay, tl.fma(value, decay_low, y))
    else:
        value += y
    if STOCHASTIC:
        key0, key1, stream_, draw = noise_source(rng, rounding_stream(stream), 0)
        element = row * n + (first_column + start)
        if QUADS:  # n' is a multiple of 4, as the tiles are: rows begin with a block
            quad = element // 4 + tl.arange(0, CW // 4)[None, :]
            # Nothing is added, which Triton does not know: it gives the words the layout of what
            # they round, where they stay in registers.
            v0, _ = tl.split(tl.split(value.reshape(value.shape[0], CW // 4, 2, 2))[0])
            quad += (v0 > float("inf")).to(tl.int64)
            w0, w1, w2, w3 = block_words(key0, key1, stream_, draw, quad)
            word = interleave_rows(w0, w1, w2, w3)
        else:
            element += tl.arange(0, CW)[None, :]
            word = word_of_element(key0, key1, stream_, draw, element)
        rounded = round_stochastic(value, word, DTYPE)
    else:
        rounded = round_nearest(value, DTYPE)
    at, inside = _part(
        w, row, row_inside, first_column, start, last, n, w_columns, w_stride,
        CW, VEC, ROWS, W_ALIGNED,
    )  # fmt: skip
    tl.store(at, rounded, mask=inside)


@triton.jit
def _update_item(
    w, u, v, core, coeff, queries, rng, m, n, u_stride, v_stride, w_columns, w_stride, rank, stream,
    mu, strip, first_tile, tiles, decay, decay_low,
    DTYPE: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
    PARTS: tl.constexpr, WARPS: tl.constexpr, DRAW: tl.constexpr, EXACT: tl.constexpr,
    LOW: tl.constexpr, SCALED: tl.constexpr, WIDE_V: tl.constexpr, W_ALIGNED: tl.constexpr,
    UV_ALIGNED: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    """Strip ``strip``, ``tiles`` tiles from ``first_tile`` on; sizes and these three are int64."""
    CW: tl.constexpr = 4 * VEC
    BN: tl.constexpr = PARTS * CW
    first_column = first_tile * BN
    last = at_most(tl.minimum(n - first_column, tiles * BN), 0x7FFFFF00)
    row = (strip * BM + tl.arange(0, BM))[:, None]
    row_inside = row < m
    w0, w1, w2, w3 = _load_parts(
        w, row, row_inside, first_column, 0, last, n, w_columns, w_stride,
        CW, VEC, ROWS, W_ALIGNED, PARTS,
    )  # fmt: skip

    u_row = strip * BM + strip_rows(BM, WARPS)
    h0, l0, h1, l1, h2, l2, h3, l3, scale = strip_operands(
        u, u_row, u_row < m, u_stride, core, rank, coeff, queries, rng, stream, mu,
        R, DRAW, UV_ALIGNED, EXACT, LOW, SCALED,
    )  # fmt: skip
    v_row = tile_columns(BN, VEC)[None, :]
    for tile in tl.range(0, tiles.to(tl.int32)):
        start = tile * BN
        # W of the next tile comes while this one is multiplied.
        x0, x1, x2, x3 = _load_parts(
            w, row, row_inside, first_column, start + BN, last, n, w_columns, w_stride,
            CW, VEC, ROWS, W_ALIGNED, PARTS,
        )  # fmt: skip
        y = tile_product(
            h0, l0, h1, l1, h2, l2, h3, l3, scale, v + (first_column + start) * v_stride, v_row,
            v_row < last - start, v_stride.to(tl.int32), rank,
            R, UV_ALIGNED, EXACT, LOW, SCALED, WIDE_V,
        )  # fmt: skip
        y0, y1, y2, y3 = tile_parts(y, BM, VEC, PARTS, WARPS)
        _store_part(
            w0, y0, w, row, row_inside, first_column, start, last, n, w_columns, w_stride, rng,
            stream, decay, decay_low, DTYPE, CW, VEC, ROWS, W_ALIGNED, DECAY, STOCHASTIC, QUADS,
        )  # fmt: skip
        _store_part(
            w1, y1, w, row, row_inside, first_column, start + CW, last, n, w_columns, w_stride, rng,
            stream, decay, decay_low, DTYPE, CW, VEC, ROWS, W_ALIGNED, DECAY, STOCHASTIC, QUADS,
        )  # fmt: skip
        if PARTS == 4:
            _store_part(
                w2, y2, w, row, row_inside, first_column, start + 2 * CW, last, n, w_columns,
                w_stride, rng, stream, decay, decay_low, DTYPE, CW, VEC, ROWS, W_ALIGNED, DECAY,
                STOCHASTIC, QUADS,
            )  # fmt: skip
            _store_part(
                w3, y3, w, row, row_inside, first_column, start + 3 * CW, last, n, w_columns,
                w_stride, rng, stream, decay, decay_low, DTYPE, CW, VEC, ROWS, W_ALIGNED, DECAY,
                STOCHASTIC, QUADS,
            )  # fmt: skip
        w0 = x0
        w1 = x1
        w2 = x2
        w3 = x3


_NUMBERS = [
    "queries", "m", "n", "u_stride", "v_stride", "w_columns", "w_stride", "rank", "stream", "mu",
    "tiles", "across", "decay", "decay_low",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def update_one_kernel(
    w, u, v, core, coeff, queries, rng, m, n, u_stride, v_stride, w_columns, w_stride, rank, stream,
    mu, tiles, across, decay, decay_low,
    DTYPE: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
    PARTS: tl.constexpr, WARPS: tl.constexpr, DRAW: tl.constexpr, EXACT: tl.constexpr,
    LOW: tl.constexpr, SCALED: tl.constexpr, WIDE_V: tl.constexpr, W_ALIGNED: tl.constexpr,
    UV_ALIGNED: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    """One matrix, a program for each item: ``across`` items of ``tiles`` tiles make a strip."""
    BN: tl.constexpr = PARTS * 4 * VEC
    item = tl.program_id(0).to(tl.int64)
    first_tile = item % across * tiles
    n = n.to(tl.int64)
    _update_item(
        w, u, v, core, coeff, queries, rng, m, n, u_stride.to(tl.int64), v_stride.to(tl.int64),
        w_columns.to(tl.int64), w_stride.to(tl.int64), rank, stream, mu,
        item // across, first_tile, tl.minimum(tiles, tl.cdiv(n, BN) - first_tile),
        decay, decay_low, DTYPE, VEC, R, BM, PARTS, WARPS, DRAW, EXACT, LOW, SCALED, WIDE_V,
        W_ALIGNED, UV_ALIGNED, ROWS, DECAY, STOCHASTIC, QUADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["matrices", "items", "queries"])
def update_many_kernel(
    table, firsts, matrices, items, scratch, coeff, queries, rng,
    FIELDS: tl.constexpr, U_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
    PARTS: tl.constexpr, WARPS: tl.constexpr, DRAW: tl.constexpr, EXACT: tl.constexpr,
    LOW: tl.constexpr, SCALED: tl.constexpr, WIDE_V: tl.constexpr, W_ALIGNED: tl.constexpr,
    UV_ALIGNED: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """All matrices of a table (backends/triton.py fills it), in ``items`` items, by any grid."""
    BN: tl.constexpr = PARTS * 4 * VEC
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        index = find(firsts, matrices, item)
        entry = table + FIELDS * index
        local = item - tl.load(firsts + index)
        n = tl.load(entry + 8)
        tiles = tl.load(entry + 13)
        across = tl.load(entry + 14)
        first_tile = local % across * tiles
        _update_item(
            tl.load(entry + 4).to(tl.pointer_type(DTYPE), bitcast=True),
            tl.load(entry + 5).to(tl.pointer_type(U_DTYPE), bitcast=True),
            tl.load(entry + 6).to(tl.pointer_type(V_DTYPE), bitcast=True),
            scratch + tl.load(entry + 3), coeff, queries, rng, tl.load(entry + 7), n,
            tl.load(entry + 9), tl.load(entry + 10), tl.load(entry + 11), tl.load(entry + 12),
            tl.load(entry).to(tl.int32), tl.load(entry + 1),
            tl.load(entry + 2).to(tl.int32).to(tl.float32, bitcast=True),
            local // across, first_tile, tl.minimum(tiles, tl.cdiv(n, BN) - first_tile),
            1.0, 0.0, DTYPE, VEC, R, BM, PARTS, WARPS, DRAW, EXACT, LOW, SCALED, WIDE_V,
            W_ALIGNED, UV_ALIGNED, ROWS, False, STOCHASTIC, QUADS,
        )  # fmt: skip
