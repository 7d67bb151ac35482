"""lowrank_embedding: rows E[i] + (U[i] C_g) V^T, made strip by strip as W is in lowrank_update."""

import triton
import triton.language as tl

from .common import round_nearest
from .lowrank_update import _part
from .strip import strip_operands, strip_rows, tile_columns, tile_parts, tile_product


@triton.jit
def _write_part(
    out, w, y, row, inside, entry, known, start, n, w_stride,
    CW: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    at, read = _part(w, entry, known, 0, start, n, n, n, w_stride, CW, VEC, True, ALIGNED)
    e = tl.load(at, mask=read, other=float("nan")).to(tl.float32)
    at, written = _part(out, row, inside, 0, start, n, n, n, n, CW, VEC, True, ALIGNED)
    tl.store(at, round_nearest(e + y, out.dtype.element_ty), mask=written)


@triton.jit(
    do_not_specialize=["tokens", "entries", "n", "w_stride", "u_stride", "v_stride", "rank"]
)
def embedding_kernel(
    out, ids, w, u, v, core, tokens, entries, n, w_stride, u_stride, v_stride, rank,
    VEC: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr,
    EXACT: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, WIDE_V: tl.constexpr,
    ALIGNED: tl.constexpr, UV_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (strip of BM of a group's tokens, group). An id out of range gives a row of NaN."""
    CW: tl.constexpr = 4 * VEC
    BN: tl.constexpr = PARTS * CW
    group = tl.program_id(1).to(tl.int64)
    ids += group * tokens
    out += group * tokens * n
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = row < tokens
    entry = tl.load(ids + row, mask=inside, other=-1).to(tl.int64)
    known = (entry >= 0) & (entry < entries)
    turned = tl.program_id(0).to(tl.int64) * BM + strip_rows(BM, WARPS)
    turned = tl.load(ids + turned, mask=turned < tokens, other=-1).to(tl.int64)
    h0, l0, h1, l1, h2, l2, h3, l3, scale = strip_operands(
        u, turned, (turned >= 0) & (turned < entries), u_stride, core + group * rank * rank, rank,
        core, 0, ids, 0, 1.0, R, False, UV_ALIGNED, EXACT, LOW, SCALED,
    )  # fmt: skip
    row, inside = row[:, None], inside[:, None]
    entry, known = entry[:, None], known[:, None]

    v_row = tile_columns(BN, VEC)[None, :]
    for tile in tl.range(0, tl.cdiv(n, BN)):
        start = tile * BN
        y = tile_product(
            h0, l0, h1, l1, h2, l2, h3, l3, scale, v + start.to(tl.int64) * v_stride, v_row,
            v_row < n - start, v_stride, rank, R, UV_ALIGNED, EXACT, LOW, SCALED, WIDE_V,
        )  # fmt: skip
        y0, y1, y2, y3 = tile_parts(y, BM, VEC, PARTS, WARPS)
        _write_part(out, w, y0, row, inside, entry, known, start, n, w_stride, CW, VEC, ALIGNED)
        _write_part(
            out, w, y1, row, inside, entry, known, start + CW, n, w_stride, CW, VEC, ALIGNED
        )
        if PARTS == 4:
            _write_part(
                out, w, y2, row, inside, entry, known, start + 2 * CW, n, w_stride, CW, VEC, ALIGNED
            )
            _write_part(
                out, w, y3, row, inside, entry, known, start + 3 * CW, n, w_stride, CW, VEC, ALIGNED
            )
