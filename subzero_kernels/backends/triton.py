"""The Triton backend: kernels compiled on first use, for NVIDIA GPUs where nvcc is not installed.

The kernels are in :mod:`.triton_kernels`. With ``TRITON_INTERPRET=1`` in the environment before
this module is imported they run on CPU tensors, slowly, one NumPy call an operation.

A kernel that takes many tensors reads their addresses from a table in device memory, which is made
once for a list of tensors and kept. A CUDA graph captures such calls too; calls that were made
before, or a plan's, cost it nothing, others the kernels that write the table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from . import _high_rank as high_rank
from ._gemms import lowrank_linear as lowrank_linear
from .reference import _exact_products
from .triton_kernels import shapes
from .triton_kernels.dense import Dense, run_of, vector
from .triton_kernels.launch import described, interpreted, launch, multiprocessors
from .triton_kernels.noise import (
    add_noise_kernel,
    core_noise_kernel,
    normal_kernel,
    philox4x32_kernel,
)
from .triton_kernels.noise_outer import add_parts_kernel, noise_outer_kernel, noise_sum_kernel
from .triton_kernels.norm import norm_kernel
from .triton_kernels.plans import (
    Launches,
    bits_of,
    kind_of,
    row_stride,
    signed,
    update_one,
)
from .triton_kernels.side_path import embedding_kernel
from .triton_kernels.tables import Recent, Table, capturing

OPS = frozenset(
    {
        "philox4x32",
        "normal_",
        "perturb_",
        "perturb_many_",
        "perturb_dense_",
        "core_noise_",
        "fold_",
        "add_noise_",
        "noise_outer_",
        "lowrank_linear",
        "lowrank_embedding",
        "grouped_norm",
    }
)

DEVICES = ("cuda", "cpu") if interpreted else ("cuda",)

# Widths of A that noise_outer_ multiplies where it makes the noise; wider ones go through cuBLAS,
# with the noise of this many elements at a time, but no more than `out` has.
_NATIVE_WIDTH = 128
# And the most rows: of 16,384 its sums were 4 to 6 times as far off as the contract allows (H100).
_NATIVE_ROWS = 1024
_NOISE_ELEMENTS = 1 << 22
# noise_outer_ makes at least this many programs, as far as their sums fit into 1 MiB.
_OUTER_PROGRAMS = 264
_OUTER_SCRATCH = 1 << 18


def available() -> tuple[bool, str]:
    """Whether Triton can compile for a GPU here, or interprets."""
    import triton

    if interpreted:
        return True, f"Triton {triton.__version__} interprets (TRITON_INTERPRET is set)"
    if not torch.cuda.is_available():
        return False, "PyTorch finds no NVIDIA GPU"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return False, "the kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    return True, f"kernels compiled on first use by Triton {triton.__version__}"


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# ---- noise


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    words = torch.empty_like(counter)
    count = counter.shape[0]
    launch(
        "philox4x32", philox4x32_kernel, (_ceil(count, 256),), counter.device,
        counter, key, words, count, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return words


def normal_(out: Tensor, rng: Tensor, stream: int) -> None:
    columns, stride, flat, aligned = run_of(out)
    shape, vec = shapes.NORMAL, vector(out.dtype)
    launch(
        "normal_", normal_kernel, (_ceil(out.numel(), vec * shape.units),), out.device,
        out, rng, out.numel(), columns, stride, signed(stream),
        FLAT=flat, ALIGNED=aligned, VEC=vec, N=shape.units, num_warps=shape.warps,
    )  # fmt: skip


_dense: Recent[Dense] = Recent(32)


def perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    device = ws[0].device
    key = (device, tuple(streams), *[(w.data_ptr(), w.dtype, w.shape, w.stride()) for w in ws])
    _dense.get_or_make(key, lambda: Dense(ws, streams), device).run(
        coeff, rng, rounding == "stochastic"
    )


_cores: Recent[tuple[Table, str]] = Recent(32)  # and what an error says of the cores


def core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> None:
    rows: list[int] = []
    for cores, start, stream, scale in zip(out, base, streams, mu, strict=True):
        rank = start.shape[0]
        rows += [rank, stream, bits_of(scale), cores.data_ptr(), start.data_ptr()]
    groups, queries = coeff.shape
    device, shape = coeff.device, shapes.CORE

    def make() -> tuple[Table, str]:
        return Table(rows, device), described(len(base), core=base[0])

    table, on = _cores.get_or_make((device, *rows), make, device)
    runs = _ceil(max(start.shape[0] for start in base) ** 2, 4 * shape.units)
    # The third axis of a grid ends at 65,535: more groups are taken in turn.
    for first in range(0, groups, _MOST_GROUPS):
        launch(
            "core_noise_", core_noise_kernel,
            (len(base), runs, min(groups - first, _MOST_GROUPS)), device,
            table.tensor(), coeff, coeff, queries, rng, first,
            FIELDS=5, SCRATCH=False, N=shape.units, num_warps=shape.warps,
            on=on,
        )  # fmt: skip


_MOST_GROUPS = 65_535


def add_noise_(
    y: Tensor, scale: Tensor, query: Tensor, rows: Tensor, rng: Tensor, *, stream: int
) -> None:
    groups, count, columns = y.shape
    shape, vec = shapes.ROWS, vector(y.dtype)
    strides = y.stride(0), y.stride(1)
    aligned = y.data_ptr() % 16 == 0 and not any(n % vec for n in (columns, *strides))
    # Rows in runs: starting a program for a row without noise takes longer than looking at it.
    programs = 16 * multiprocessors(y.device)
    run = max(1, min(16, groups * count // programs))
    runs = _ceil(count, run)
    across = min(_ceil(columns + 3, vec * shape.units), _ceil(programs, groups * runs))
    launch(
        "add_noise_", add_noise_kernel, (groups * runs, across), y.device,
        y, scale, query, rows, rng, count, columns, *strides, signed(stream), run, runs,
        ALIGNED=aligned, VEC=vec, N=shape.units, num_warps=shape.warps,
    )  # fmt: skip


def noise_outer_(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    rows: Tensor,
    rng: Tensor,
    *,
    stream: int,
    beta: float = 0.0,
) -> None:
    (columns, width), (queries, count) = out.shape, weight.shape
    if width > _NATIVE_WIDTH or count > _NATIVE_ROWS:
        _wide_outer(out, weight, a, rows, rng, stream, beta)
        return
    shape = shapes.outer(width)
    tiles = _ceil(columns, shape.columns)
    parts = min(
        _ceil(_OUTER_PROGRAMS, tiles),
        _OUTER_SCRATCH // (columns * width),
        _ceil(count, shape.rows),
    )
    parts = max(1, parts)
    part = _ceil(_ceil(max(count, 1), parts), shape.rows) * shape.rows
    parts = _ceil(max(count, 1), part)
    scratch = out
    if parts > 1:
        scratch = torch.empty(parts * columns * width, dtype=torch.float32, device=out.device)
    high = torch.tensor(beta, dtype=torch.float32, device="cpu").item()
    out_stride = row_stride(out)
    launch(
        "noise_outer_", noise_outer_kernel, (tiles, parts), out.device,
        out, scratch, weight, a, rows, rng, queries, count, columns, width, row_stride(a),
        out_stride, signed(stream), part, high, beta - high,
        R=max(16, 1 << (width - 1).bit_length()), BN=shape.rows, BC=shape.columns,
        QUADS=columns % 4 == 0, SPLIT=parts > 1, BETA=beta != 0, num_warps=shape.warps,
    )  # fmt: skip
    if parts > 1:
        size = columns * width
        launch(
            "noise_outer_", add_parts_kernel, (_ceil(size, 1024),), out.device,
            out, scratch, size, width, out_stride, parts, high, beta - high,
            BLOCK=1024, BETA=beta != 0, num_warps=4,
        )  # fmt: skip


@_exact_products
def _wide_outer(
    out: Tensor, weight: Tensor, a: Tensor, rows: Tensor, rng: Tensor, stream: int, beta: float
) -> None:
    (queries, count), columns = weight.shape, out.shape[0]
    if not count:
        out.mul_(beta) if beta else out.zero_()
    shape = shapes.SUM
    step = max(1, min(_NOISE_ELEMENTS, out.numel()) // columns)
    buffer = out.new_empty(min(step, count), columns)
    for start in range(0, count, step):
        part = slice(start, start + step)
        some = len(rows[part])
        noise = buffer[:some]
        launch(
            "noise_outer_", noise_sum_kernel,
            (_ceil(some, shape.rows), _ceil(columns, shape.columns)), out.device,
            noise, weight[:, part], rows[part], rng, queries, count, some, columns, signed(stream),
            BN=shape.rows, BC=shape.columns, QUADS=columns % 4 == 0, num_warps=shape.warps,
        )  # fmt: skip
        out.addmm_(noise.T, a[part].float(), beta=1.0 if start else beta)


# ---- low-rank updates


class PerturbPlan:
    """perturb_many_ on one list of matrices: their addresses go to the device once."""

    def __init__(
        self,
        ws: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        streams: Sequence[int],
    ) -> None:
        self._items = list(zip(ws, us, vs, streams, strict=True))  # keeps the memory alive
        self._high_rank = [i for i in self._items if i[1].shape[1] > high_rank.NATIVE_RANK]
        native = [i for i in self._items if i[1].shape[1] <= high_rank.NATIVE_RANK]
        self._native = native
        self._launches: dict[str, Launches] = {}
        if not capturing(ws[0].device):
            self._launches_for("nearest")

    def _launches_for(self, rounding: str) -> Launches:
        made = self._launches.get(rounding)
        if made is None:
            made = Launches(self._native, "perturb_many_", rounding == "stochastic")
            if not capturing(self._items[0][0].device):
                self._launches[rounding] = made
        return made

    def perturb_(self, coeff: Tensor, rng: Tensor, rounding: str = "nearest") -> None:
        self._launches_for(rounding).perturb_(coeff, rng)
        for w, u, v, stream in self._high_rank:
            high_rank.perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)


perturb_plan = PerturbPlan


def perturb_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    coeff: Tensor,
    rng: Tensor,
    *,
    stream: int,
    rounding: str = "nearest",
) -> None:
    if u.shape[1] > high_rank.NATIVE_RANK:
        high_rank.perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)
        return
    update_one("perturb_", w, u, v, None, coeff, rng, stream=stream, rounding=rounding)


_Item = tuple[Tensor, Tensor, Tensor, int]  # w, u, v, stream
_launches: Recent[Launches] = Recent(32)


def _layout(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _launches_of(items: list[_Item], rounding: str, device: torch.device) -> Launches:
    layouts = [(_layout(w), _layout(u), _layout(v), stream) for w, u, v, stream in items]

    def make() -> Launches:
        return Launches(items, "perturb_many_", rounding == "stochastic")

    return _launches.get_or_make((device, rounding, *layouts), make, device)


def prepare_perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Callable[[Tensor, Tensor], None] | None:
    """None where the launches are not for keeping: a capture's belong to its graph, and high ranks
    need the tensors themselves."""
    device = ws[0].device
    if capturing(device) or any(u.shape[1] > high_rank.NATIVE_RANK for u in us):
        return None
    return _launches_of(list(zip(ws, us, vs, streams, strict=True)), rounding, device).perturb_


def perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    items, device = list(zip(ws, us, vs, streams, strict=True)), ws[0].device
    native = [item for item in items if item[1].shape[1] <= high_rank.NATIVE_RANK]
    _launches_of(native, rounding, device).perturb_(coeff, rng)
    if len(native) < len(items):
        for w, u, v, stream in items:
            if u.shape[1] > high_rank.NATIVE_RANK:
                high_rank.perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)


def fold_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    *,
    decay: float = 1.0,
    rounding: str = "nearest",
    rng: Tensor | None = None,
    stream: int = 0,
) -> None:
    if u.shape[1] > high_rank.NATIVE_RANK:
        high_rank.fold_(w, u, v, core, decay=decay, rounding=rounding, rng=rng, stream=stream)
        return
    update_one("fold_", w, u, v, core, None, rng, stream=stream, rounding=rounding, decay=decay)


# ---- side path


def lowrank_embedding(ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    """An id out of range gives a row of NaN."""
    (entries, n), (groups, rank) = w.shape, core.shape[:2]
    if rank > high_rank.NATIVE_RANK:
        from . import reference

        return reference.lowrank_embedding(ids, w, u, v, core)
    out = torch.empty(*ids.shape, n, dtype=w.dtype, device=w.device)
    kind = kind_of(w, u, v)
    constants = kind.constants(stochastic=False)
    for name in ("DTYPE", "W_ALIGNED", "ROWS", "QUADS", "STOCHASTIC"):
        del constants[name]
    tokens = ids.numel() // groups
    launch(
        "lowrank_embedding", embedding_kernel, (_ceil(tokens, constants["BM"]), groups), w.device,
        out, ids.contiguous(), w, u, v, core, tokens, entries, n, row_stride(w), row_stride(u),
        row_stride(v), rank, ALIGNED=kind.w_aligned, **constants,
    )  # fmt: skip
    return out


# ---- norms

_WIDEST_NORM = 1 << 15


def grouped_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    n = x.shape[-1]
    if n > _WIDEST_NORM:
        from . import reference

        return reference.grouped_norm(x, weight, bias, eps, centred)
    lines = x.reshape(-1, n)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values = [value for value in (weight, bias) if value is not None and value.dim() == 2]
    groups = len(values[0]) if values else 1
    rows, shape = len(lines) // groups, shapes.norm(n, len(lines))
    runs = _ceil(rows, shape.rows)
    launch(
        "grouped_norm", norm_kernel, (groups * runs,), x.device,
        out, lines, x if weight is None else weight, x if bias is None else bias, rows, n,
        lines.stride(0), _group_stride(weight), _group_stride(bias), eps, runs,
        CENTRED=centred, WEIGHT=weight is not None, BIAS=bias is not None,
        RUN=shape.rows, BLOCK=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return out


def _group_stride(value: Tensor | None) -> int:
    """From a group's values to the next one's; 0 where all share them."""
    return value.stride(0) if value is not None and value.dim() == 2 else 0
