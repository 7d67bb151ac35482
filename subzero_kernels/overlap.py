"""Which tensors share memory.

Two disjoint column slices of one buffer do not, although their byte ranges interleave.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple, cast

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Region(NamedTuple):
    """The bytes of a tensor: ``rows`` segments of ``width``, ``pitch`` apart, from ``start``."""

    space: Hashable
    start: int
    rows: int
    width: int
    pitch: int
    name: str
    written: bool

    @property
    def end(self) -> int:
        return self.start + (self.rows - 1) * self.pitch + self.width

    def same_memory(self, other: Region) -> bool:
        return self[:5] == other[:5]


def _place(tensor: Tensor) -> tuple[Hashable, int]:
    """The address space of a tensor and the address of its first byte in it."""
    # Not isinstance, which for classes of tensors runs Python code.
    if FakeTensor in type(tensor).__mro__ or tensor.is_meta:
        # No addresses here: tensors share memory only if they share the storage object.
        offset = cast(int, tensor.storage_offset())
        return tensor.untyped_storage()._cdata, offset * tensor.element_size()
    return tensor.device, tensor.data_ptr()


def region(name: str, tensor: Tensor, *, written: bool) -> Region:
    """The bytes of a non-empty tensor that is contiguous or a matrix with contiguous rows."""
    size = tensor.element_size()
    space, start = _place(tensor)
    if tensor.is_contiguous():
        width = tensor.numel() * size
        return Region(space, start, 1, width, width, name, written)
    rows, columns = tensor.shape
    return Region(space, start, rows, columns * size, tensor.stride(0) * size, name, written)


def regions(name: str, tensor: Tensor, *, written: bool) -> list[Region]:
    """:func:`region`, also for a (G, N, c) tensor whose last axis alone is contiguous.

    That is one region where all its rows are equally spaced, else one for each index of the
    shorter of them.
    """
    if tensor.is_contiguous() or tensor.dim() != 3:
        return [region(name, tensor, written=written)]
    size = tensor.element_size()
    space, start = _place(tensor)
    (many, pitch), (few, step) = (
        (tensor.shape[axis], tensor.stride(axis) * size)
        for axis in ((1, 0) if tensor.shape[0] <= tensor.shape[1] else (0, 1))
    )
    if step == many * pitch:
        few, many = 1, few * many
    elif pitch == few * step:
        few, many, pitch = 1, few * many, step
    return [
        Region(space, start + i * step, many, tensor.shape[2] * size, pitch, name, written)
        for i in range(few)
    ]


def _segment_hits(start: int, end: int, rectangle: Region) -> bool:
    """Whether bytes start .. end meet any row of the rectangle."""
    first = max(0, (start - rectangle.start - rectangle.width) // rectangle.pitch + 1)
    return first < rectangle.rows and rectangle.start + first * rectangle.pitch < end


def overlap(a: Region, b: Region) -> bool:
    """Whether two regions share a byte."""
    if a.space != b.space or a.end <= b.start or b.end <= a.start:
        return False
    few, many = (a, b) if a.rows <= b.rows else (b, a)
    if few.pitch == many.pitch and few.rows > 1:
        # Rows repeat with the same period, so whole rectangles meet iff the common part of their
        # columns does.
        shift, phase = divmod(many.start - few.start, few.pitch)
        touching = []
        if phase < few.width:
            touching.append(shift)
        if phase + many.width > few.pitch:
            touching.append(shift + 1)
        # Row i of `many` lies on row i + s of `few` for each s in touching.
        return any(-many.rows < s < few.rows for s in touching)
    return any(
        _segment_hits(few.start + i * few.pitch, few.start + i * few.pitch + few.width, many)
        for i in range(few.rows)
    )


def clashes(items: Iterable[Region]) -> Iterator[tuple[Region, Region]]:
    """Pairs (written, other) that share memory, by a sweep over the addresses of each space.

    The regions of one tensor, which bear one name, do not meet: its layout has been checked.
    """
    spaces: dict[Hashable, list[Region]] = {}
    for item in items:
        spaces.setdefault(item.space, []).append(item)
    for space in spaces.values():
        active: list[Region] = []
        for item in sorted(space, key=lambda item: item.start):
            active = [other for other in active if other.end > item.start]
            for other in active:
                if item.name == other.name or not (item.written or other.written):
                    continue
                if overlap(item, other):
                    yield (other, item) if other.written else (item, other)
            active.append(item)
