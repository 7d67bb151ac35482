"""A strip of rows times V: what lowrank_update and side_path do with the tensor cores.

P = U C of a strip stays on the chip, as operands of up to four blocks of 64 of its columns; a tile
of columns of P V^T is then one product a block.

In the accumulator of the tensor cores' m16n8 a thread holds columns 2 t and 2 t + 1 of rows q and
q + 8 (q = lane / 4, t = lane % 4). So permuted rows of U are multiplied with permuted rows of V:
with accumulator columns (part, j, t, i) standing for columns VEC t + 2 j + i of the part, a thread
holds VEC neighbours, 16 bytes of W, and with rows (warp, half, q) standing for (half, warp, q) the
parts lie in registers as Triton loads W from memory. The reshapes that say so move nothing: W never
goes through shared memory.

Precision, in the order of the kernels' flags. EXACT: fp32 arithmetic, for matrices so small that
the rounding of operands need not average out. LOW and WIDE_V: P and V as a high and a low bf16 half
each (hi hi + lo hi + hi lo) instead of one bf16 number. SCALED: V is fp16; rows of P are scaled by
a power of two into the range of fp16, and V is exact.
"""

import triton
import triton.language as tl

from .common import dot, split
from .philox import noise_source, normal_of_element


@triton.jit
def strip_rows(BM: tl.constexpr, WARPS: tl.constexpr):
    """The row of the strip that stands in each row of the accumulator."""
    m = tl.arange(0, BM)
    q = m % 8
    half = m // 8 % 2
    warp = m // 16 % WARPS
    return m // (16 * WARPS) * (16 * WARPS) + half * (8 * WARPS) + warp * 8 + q


@triton.jit
def tile_columns(BN: tl.constexpr, VEC: tl.constexpr):
    """The column of the tile that stands in each column of the accumulator."""
    a = tl.arange(0, BN)
    i = a % 2
    t = a // 2 % 4
    j = a // 8 % (VEC // 2)
    return a // (4 * VEC) * (4 * VEC) + VEC * t + 2 * j + i


@triton.jit
def tile_parts(
    accumulator,
    BM: tl.constexpr, VEC: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """(BM, 4 VEC) parts of a tile in their own order of rows and columns, all in registers.

    Four of them, of which the first PARTS are distinct.
    """
    whole = accumulator.reshape(BM // (16 * WARPS), WARPS, 2, 8, PARTS, VEC // 2, 4, 2)
    whole = whole.permute(0, 2, 1, 3, 6, 5, 7, 4)
    if PARTS == 2:
        y0, y1 = tl.split(whole.reshape(BM, 4 * VEC, 2))
        return y0, y1, y0, y1
    else:
        even, odd = tl.split(whole.reshape(BM, 4 * VEC, 2, 2))  # parts 2 a + b: the last axis is b
        y0, y2 = tl.split(even)
        y1, y3 = tl.split(odd)
        return y0, y1, y2, y3


@triton.jit
def _product_block(
    u, row, inside, stride, core, rank, first, coeff, queries, rng, stream, mu,
    R: tl.constexpr, BLOCK: tl.constexpr, DRAW: tl.constexpr, UV_ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of P = U C from ``first`` on, fp32, for rows ``row`` of U.

    C is fp32 (rank, rank) in memory, or with DRAW mu sum_k coeff[k] Z_(draw + k), made here.
    """
    if UV_ALIGNED:
        rank = tl.multiple_of(tl.minimum(rank, R), 8)
    column = first + tl.arange(0, BLOCK)
    product = tl.zeros((row.shape[0], BLOCK), tl.float32)
    K: tl.constexpr = BLOCK if R <= 64 else 32
    for start in tl.range(0, R, K, num_stages=1):
        k = start + tl.arange(0, K)
        at = (u + (row * stride)[:, None]) + k[None, :]
        if UV_ALIGNED:
            at = tl.multiple_of(at, (16, 16))
        part = tl.load(at, mask=inside[:, None] & (k < rank)[None, :], other=0.0)
        element = k[:, None] * rank + column[None, :]
        held = (k < rank)[:, None] & (column < rank)[None, :]
        if DRAW:
            c = tl.zeros((K, BLOCK), tl.float32)
            for query in range(queries):
                weight = tl.load(coeff + query)
                if weight != 0.0:
                    key0, key1, stream_, draw = noise_source(rng, stream, query)
                    z = normal_of_element(key0, key1, stream_, draw, element.to(tl.int64))
                    c = tl.fma(z, weight, c)
            c = tl.where(held, mu * c, 0.0)
        else:
            c = tl.load(core + element, mask=held, other=0.0)
        if EXACT:
            product = tl.dot(part.to(tl.float32), c, product, input_precision="ieee")
        else:
            c_high, c_low = split(c)
            if part.dtype == tl.bfloat16:
                product = dot(part, c_low, product)
                product = dot(part, c_high, product)
            else:
                high, low = split(part.to(tl.float32))
                product = dot(high, c_low, product)
                product = dot(low, c_high, product)
                product = dot(high, c_high, product)
    return product


@triton.jit
def _operands(product, EXACT: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr):
    """A block of P as operands: high, low (if LOW, else high again), scale of its rows."""
    scale = tl.full((product.shape[0],), 1.0, tl.float32)
    if EXACT:
        high = product
        low = product
    elif SCALED:
        # Powers of two: what a row is divided by, and its reciprocal, both normal numbers.
        bits = tl.max(tl.abs(product), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(bits, 253 << 23)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        scale = bits.to(tl.float32, bitcast=True)
        high = (product * inverse[:, None]).to(tl.float16)
        low = high
    else:
        high, low = split(product)
        if not LOW:
            low = high
    return high, low, scale


@triton.jit
def strip_operands(
    u, row, inside, stride, core, rank, coeff, queries, rng, stream, mu,
    R: tl.constexpr, DRAW: tl.constexpr, UV_ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    LOW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """P of the strip: (high, low) of four blocks of columns, and the scale of the rows.

    Of the blocks R / 64 are distinct, at least one; SCALED takes one.
    """
    B: tl.constexpr = R if R <= 64 else 64
    product = _product_block(
        u, row, inside, stride, core, rank, 0, coeff, queries, rng, stream, mu,
        R, B, DRAW, UV_ALIGNED, EXACT,
    )  # fmt: skip
    h0, l0, scale = _operands(product, EXACT, LOW, SCALED)
    h1, l1, h2, l2, h3, l3 = h0, l0, h0, l0, h0, l0
    if R > 64:
        product = _product_block(
            u, row, inside, stride, core, rank, 64, coeff, queries, rng, stream, mu,
            R, B, DRAW, UV_ALIGNED, EXACT,
        )  # fmt: skip
        h1, l1, _ = _operands(product, EXACT, LOW, SCALED)
    if R > 128:
        product = _product_block(
            u, row, inside, stride, core, rank, 128, coeff, queries, rng, stream, mu,
            R, B, DRAW, UV_ALIGNED, EXACT,
        )  # fmt: skip
        h2, l2, _ = _operands(product, EXACT, LOW, SCALED)
        product = _product_block(
            u, row, inside, stride, core, rank, 192, coeff, queries, rng, stream, mu,
            R, B, DRAW, UV_ALIGNED, EXACT,
        )  # fmt: skip
        h3, l3, _ = _operands(product, EXACT, LOW, SCALED)
    return h0, l0, h1, l1, h2, l2, h3, l3, scale


@triton.jit
def _load_v(
    v, v_row, inside, stride, rank, first, R: tl.constexpr, BLOCK: tl.constexpr,
    UV_ALIGNED: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of V from ``first`` on of rows ``v_row`` after v: (BLOCK, BN)."""
    if UV_ALIGNED:
        rank = tl.multiple_of(tl.minimum(rank, R), 8)
    k = first + tl.arange(0, BLOCK)[:, None]
    at = v + (v_row * stride + k)
    if UV_ALIGNED:
        at = tl.multiple_of(at, (16, 16))
    return tl.load(at, mask=inside & (k < rank), other=0.0)


@triton.jit
def _add_block(
    y, high, low, v,
    EXACT: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    if EXACT:
        y = tl.dot(high, v.to(tl.float32), y, input_precision="ieee")
    elif WIDE_V and not SCALED:
        v_high, v_low = split(v.to(tl.float32))
        y = dot(high, v_low, y)
        if LOW:
            y = dot(low, v_high, y)
        y = dot(high, v_high, y)
    else:
        if LOW:
            y = dot(low, v, y)
        y = dot(high, v, y)
    return y


@triton.jit
def tile_product(
    h0, l0, h1, l1, h2, l2, h3, l3, scale, v, v_row, inside, stride, rank,
    R: tl.constexpr, UV_ALIGNED: tl.constexpr, EXACT: tl.constexpr, LOW: tl.constexpr,
    SCALED: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """P V^T for the rows ``v_row`` after v, where ``inside``: (BM, BN) in the accumulator's order.

    v_row times stride must fit into 32 bits.
    """
    B: tl.constexpr = R if R <= 64 else 64
    y = tl.zeros((h0.shape[0], v_row.shape[1]), tl.float32)
    block = _load_v(v, v_row, inside, stride, rank, 0, R, B, UV_ALIGNED)
    y = _add_block(y, h0, l0, block, EXACT, LOW, SCALED, WIDE_V)
    if R > 64:
        block = _load_v(v, v_row, inside, stride, rank, 64, R, B, UV_ALIGNED)
        y = _add_block(y, h1, l1, block, EXACT, LOW, SCALED, WIDE_V)
    if R > 128:
        block = _load_v(v, v_row, inside, stride, rank, 128, R, B, UV_ALIGNED)
        y = _add_block(y, h2, l2, block, EXACT, LOW, SCALED, WIDE_V)
        block = _load_v(v, v_row, inside, stride, rank, 192, R, B, UV_ALIGNED)
        y = _add_block(y, h3, l3, block, EXACT, LOW, SCALED, WIDE_V)
    if SCALED:
        y = y * scale[:, None]
    return y
