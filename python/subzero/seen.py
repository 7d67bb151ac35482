"""The last rows that each credited linear saw, of which the next window's bases are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import Tap


class SeenRows:
    """Rings of 4 r rows x / |x|, one for each linear, written and read without a host.

    How many rows have come is counted on the device, once for all linears of an axis. Rows of a
    step that is skipped, and entries that stand for no row, go to one more place behind the ring.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._axes = [tap.credit.axis for tap in taps]
        self._size = taps[0].remember
        self._rings = [
            tap.credit.param.new_zeros(self._size + 1, tap.credit.n) for tap in taps
        ]  # fmt: skip
        device = taps[0].credit.param.device
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = {axis: zero.clone() for axis in set(self._axes)}

    def take(self, taps: Sequence[Tap], finite: Tensor) -> None:
        """The recent rows of a step; with ``finite`` False (0-d) they are not remembered."""
        places: dict[tuple[str, int], Tensor] = {}
        for tap, ring in zip(taps, self._rings, strict=True):
            axis = tap.credit.axis
            for i, (rows, live) in enumerate(tap.recent):
                if (axis, i) not in places:
                    places[axis, i] = self._places(self._counts[axis], live & finite)
                ring.index_copy_(0, places[axis, i], rows)
            tap.recent = []

    def _places(self, count: Tensor, live: Tensor) -> Tensor:
        nth = count + live.cumsum(0) - 1
        count += live.sum()
        return torch.where(live, nth % self._size, self._size)

    def in_order(self) -> list[Tensor]:
        """(4 r, n) of each linear, the newest last, zero in front where fewer have come."""
        slots = torch.arange(self._size, device=self._rings[0].device)
        order = {axis: (count + slots) % self._size for axis, count in self._counts.items()}
        return [
            ring.index_select(0, order[axis])
            for ring, axis in zip(self._rings, self._axes, strict=True)
        ]

    def rows(self) -> list[Tensor]:
        """Those that have come, (at most 4 r, n); it waits for the device."""
        counts = {axis: min(int(count), self._size) for axis, count in self._counts.items()}
        return [
            rows[self._size - counts[axis] :]
            for rows, axis in zip(self.in_order(), self._axes, strict=True)
        ]

    def restore(self, rows: Sequence[Tensor | None]) -> None:
        """What ``rows`` gave; None: no rows have come."""
        for ring, axis, some in zip(self._rings, self._axes, rows, strict=True):
            ring.zero_()
            count = 0 if some is None else len(some)
            if some is not None:
                ring[:count].copy_(some)
            self._counts[axis].fill_(count)
