"""perturb_many_ as launches: matrices sorted by the kernel that takes them, described in tables."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import shapes
from .launch import TYPES, described, launch, multiprocessors
from .lowrank_update import update_many_kernel, update_one_kernel
from .noise import core_kernel, core_noise_kernel
from .tables import Table

# Columns of the table; core_noise_kernel reads the first four.
FIELDS = (
    "rank", "stream", "mu", "core", "w", "u", "v", "m", "n", "u_stride", "v_stride", "w_columns",
    "w_stride", "tiles", "across",
)  # fmt: skip

# Elements of P or V below which the rounding of operands need not average out.
_FEW = 4096


def bits_of(number: float) -> int:
    """A Python float, rounded to fp32, as the kernel reads it from a table."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def scale_of(m: int, n: int, rank: int) -> float:
    """mu = sqrt(m' n') / r, computed in float64, then fp32."""
    return struct.unpack("<f", struct.pack("<f", math.sqrt(m * n) / rank))[0]


def signed(stream: int) -> int:
    """A uint32 as the int32 of the same bits: one type of kernel argument for all streams."""
    return stream - (1 << 32) if stream >= 1 << 31 else stream


def row_stride(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.is_contiguous() else tensor.stride(0)


def aligned(tensor: Tensor, columns: int) -> bool:
    """Whether each row of a matrix begins at a multiple of 16 bytes and is a multiple long."""
    size = tensor.element_size()
    starts = tensor.data_ptr() % 16 == 0 and row_stride(tensor) * size % 16 == 0
    return starts and columns * size % 16 == 0


class Kind(NamedTuple):
    """What a compiled kernel is for: matrices of one kind share a launch."""

    dtype: torch.dtype
    u_dtype: torch.dtype
    v_dtype: torch.dtype
    rank: int  # padded to a power of two
    w_aligned: bool
    uv_aligned: bool
    own_rows: bool  # of W are rows of the (m', n') matrix
    quads: bool  # n' is a multiple of 4
    exact: bool  # fp32 arithmetic

    def shape(self, stochastic: bool) -> shapes.Update:
        aligned = self.w_aligned and self.uv_aligned
        return shapes.update(
            self.dtype, self.v_dtype, self.rank,
            aligned=aligned, exact=self.exact, stochastic=stochastic,
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether C is made in the kernel, by each item anew, instead of by a kernel before it."""
        return self.rank == 16

    def constants(self, stochastic: bool) -> dict[str, Any]:
        """Of the update kernels, and how to compile them."""
        stochastic = stochastic and self.dtype != torch.float32
        shape = self.shape(stochastic)
        options = {} if shape.registers is None else dict(maxnreg=shape.registers)
        return dict(
            DTYPE=TYPES[self.dtype],
            VEC=16 // self.dtype.itemsize,
            R=self.rank,
            BM=shape.rows,
            PARTS=shape.parts,
            WARPS=min(shape.warps, shape.rows // 16),
            EXACT=self.exact,
            LOW=self.dtype == torch.float32,
            SCALED=self.dtype == self.v_dtype == torch.float16 and self.rank <= 64,
            WIDE_V=self.v_dtype != torch.bfloat16,
            W_ALIGNED=self.w_aligned,
            UV_ALIGNED=self.uv_aligned,
            ROWS=self.own_rows,
            QUADS=self.quads,
            STOCHASTIC=stochastic,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **options,
        )


def kind_of(w: Tensor, u: Tensor, v: Tensor) -> Kind:
    (m, rank), n = u.shape, v.shape[0]
    own_rows = w.is_contiguous() or tuple(w.shape) == (m, n)
    w_aligned = (
        own_rows
        and (aligned(w, n) if not w.is_contiguous() else w.data_ptr() % 16 == 0)
        and n * w.element_size() % 16 == 0
    )
    return Kind(
        w.dtype,
        u.dtype,
        v.dtype,
        max(16, 1 << (rank - 1).bit_length()),
        w_aligned,
        rank % 8 == 0 and aligned(u, rank) and aligned(v, rank),
        own_rows,
        n % 4 == 0,
        min(m, n) * rank < _FEW,
    )


class Cut(NamedTuple):
    """A matrix in items: strips of rows times ``across`` runs of ``tiles`` column tiles."""

    tiles: int
    across: int
    items: int


def cut(
    shape: shapes.Update, itemsize: int, sizes: Sequence[tuple[int, int]], device: torch.device
) -> list[Cut]:
    """How to cut matrices (m, n) that share a launch, so that there is work for the whole GPU."""
    columns = shape.parts * 64 // itemsize
    grids = [(-(-m // shape.rows), -(-n // columns)) for m, n in sizes]
    total = sum(strips * tiles for strips, tiles in grids)
    wanted = total // (multiprocessors(device) * shape.items)
    most = max(1, min(shape.most_tiles, wanted))
    cuts = []
    for strips, tiles in grids:
        across = -(-tiles // most)
        each = -(-tiles // across)
        across = -(-tiles // each)
        cuts.append(Cut(each, across, strips * across))
    return cuts


def numbers_of(w: Tensor, u: Tensor, v: Tensor, own_rows: bool) -> tuple[int, ...]:
    """m, n, strides and the row length of W's memory, as the kernels name them."""
    m, n = u.shape[0], v.shape[0]
    w_stride = n if w.is_contiguous() else w.stride(0)
    return m, n, row_stride(u), row_stride(v), n if own_rows else w.shape[1], w_stride


Items = list[tuple[Tensor, Tensor, Tensor, int]]  # w, u, v, stream


class _Group:
    """The matrices of one kind, described for one way of rounding."""

    def __init__(self, kind: Kind, items: Items, stochastic: bool) -> None:
        device = items[0][0].device
        shape = kind.shape(stochastic)
        sizes = [(u.shape[0], v.shape[0]) for _, u, v, _ in items]
        cuts = cut(shape, kind.dtype.itemsize, sizes, device)
        rows, firsts, self.scratch, self.items = [], [], 0, 0
        for (w, u, v, stream), (tiles, across, count) in zip(items, cuts, strict=True):
            rank = u.shape[1]
            m, n, *strides = numbers_of(w, u, v, kind.own_rows)
            mu = bits_of(math.sqrt(m * n) / rank)
            addresses = w.data_ptr(), u.data_ptr(), v.data_ptr()
            rows += [rank, stream, mu, self.scratch, *addresses, m, n, *strides, tiles, across]
            firsts.append(self.items)
            self.items += count
            self.scratch += 0 if kind.draws else rank * rank
        self.count, self.device = len(items), device
        w, u, v, _ = items[0]
        self.on = described(len(items), w=w, u=u, v=v)
        most_rank = max(u.shape[1] for _, u, _, _ in items)
        self.core_runs = -(-most_rank * most_rank // (4 * shapes.CORE.units))
        self.constants = kind.constants(stochastic) | dict(
            FIELDS=len(FIELDS), U_DTYPE=TYPES[kind.u_dtype], V_DTYPE=TYPES[kind.v_dtype],
            DRAW=kind.draws,
        )  # fmt: skip
        resident = shape.resident * multiprocessors(device)
        self.grid = (min(self.items, resident or self.items),)
        self.firsts_at = len(rows)
        self.table = Table(rows + firsts, device)

    def run(self, op: str, coeff: Tensor, rng: Tensor) -> None:
        table = self.table.tensor()
        queries = coeff.shape[0]
        scratch = coeff
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.float32, device=self.device)
            launch(
                op, core_noise_kernel, (self.count, self.core_runs, 1), self.device,
                table, scratch, coeff, queries, rng, 0,
                FIELDS=len(FIELDS), SCRATCH=True, N=shapes.CORE.units, num_warps=shapes.CORE.warps,
                on=self.on,
            )  # fmt: skip
        launch(
            op, update_many_kernel, self.grid, self.device,
            table, table[self.firsts_at :], self.count, self.items, scratch, coeff, queries, rng,
            on=self.on, **self.constants,
        )  # fmt: skip


class Launches:
    """perturb_many_ with one rounding, on tensors that the caller keeps alive."""

    def __init__(self, items: Items, op: str, stochastic: bool) -> None:
        groups: dict[Kind, Items] = {}
        for item in items:
            groups.setdefault(kind_of(*item[:3]), []).append(item)
        self._groups = [_Group(kind, members, stochastic) for kind, members in groups.items()]
        self._op = op

    def perturb_(self, coeff: Tensor, rng: Tensor) -> None:
        for group in self._groups:
            group.run(self._op, coeff, rng)


def update_one(
    op: str, w: Tensor, u: Tensor, v: Tensor, core: Tensor | None, coeff: Tensor | None,
    rng: Tensor | None, *, stream: int, rounding: str, decay: float = 1.0,
) -> None:  # fmt: skip
    """One matrix, by a kernel that takes everything as arguments: nothing is copied to the device.

    With ``core`` it is fold_, else perturb_ with the core of ``coeff`` and ``rng``.
    """
    kind = kind_of(w, u, v)
    rank, device = u.shape[1], w.device
    m, n, *strides = numbers_of(w, u, v, kind.own_rows)
    stochastic = rounding == "stochastic"
    shape = kind.shape(stochastic)
    ((tiles, across, items),) = cut(shape, w.element_size(), [(m, n)], device)
    mu = scale_of(m, n, rank)
    draw = core is None and kind.draws
    if core is None:
        assert coeff is not None and rng is not None
        core = coeff
        if not draw:
            core = torch.empty(rank * rank, dtype=torch.float32, device=device)
            launch(
                op, core_kernel, (-(-rank * rank // (4 * shapes.CORE.units)),), device,
                core, coeff, coeff.shape[0], rng, rank * rank, signed(stream), mu,
                N=shapes.CORE.units, num_warps=shapes.CORE.warps, on=(w, u, v),
            )  # fmt: skip
    some = core if rng is None else rng  # nothing reads it
    high = torch.tensor(decay, dtype=torch.float32, device="cpu").item()
    launch(
        op, update_one_kernel, (items,), device,
        w, u, v, core, core if coeff is None else coeff, 0 if coeff is None else coeff.shape[0],
        some, m, n, *strides, rank, signed(stream), mu, tiles, across, high, decay - high,
        DRAW=draw, DECAY=decay != 1.0, on=(w, u, v), **kind.constants(stochastic),
    )  # fmt: skip
