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


def region(name: str, tensor: Tensor, *, written: bool) -> Region:
    """The bytes of a non-empty tensor that is contiguous or a matrix with contiguous rows."""
    size = tensor.element_size()
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        # No addresses here: tensors share memory only if they share the storage object.
        space: Hashable = tensor.untyped_storage()._cdata
        start = cast(int, tensor.storage_offset()) * size
    else:
        space, start = tensor.device, tensor.data_ptr()
    if tensor.is_contiguous():
        width = tensor.numel() * size
        return Region(space, start, 1, width, width, name, written)
    rows, columns = tensor.shape
    return Region(space, start, rows, columns * size, tensor.stride(0) * size, name, written)


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


def clashes(regions: Iterable[Region]) -> Iterator[tuple[Region, Region]]:
    """Pairs (written, other) that share memory, by a sweep over the addresses of each space."""
    spaces: dict[Hashable, list[Region]] = {}
    for item in regions:
        spaces.setdefault(item.space, []).append(item)
    for items in spaces.values():
        active: list[Region] = []
        for item in sorted(items, key=lambda item: item.start):
            active = [other for other in active if other.end > item.start]
            for other in active:
                if (item.written or other.written) and overlap(item, other):
                    yield (other, item) if other.written else (item, other)
            active.append(item)
