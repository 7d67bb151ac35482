"""The last rows that each credited linear saw, of which the next window's bases are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import Tap, TapStack

# Rows of a step up to which those of all linears of a shape are written together.
_FEW_ROWS = 64


class SeenRows:
    """Rings of 4 r rows x / |x|, one for each linear, written and read without a host.

    How many rows have come is counted on the device, once for all linears of an axis. Rows of a
    step that is skipped, and entries that stand for no row, go to one more place behind the ring.
    """

    def __init__(self, taps: Sequence[Tap], stacks: Sequence[TapStack]) -> None:
        self._stacks = list(stacks)
        self._size = taps[0].remember
        self._rings: list[Tensor] = []  # of each stack (linears, 4 r + 1, n)
        place: dict[int, Tensor] = {}
        for stack in stacks:
            first = stack.taps[0].credit
            ring = first.param.new_zeros(len(stack.taps), self._size + 1, first.n)
            self._rings.append(ring)
            place |= {id(tap): own for tap, own in zip(stack.taps, ring, strict=True)}
        self._own = [(place[id(tap)], tap.credit.axis) for tap in taps]
        zero = torch.zeros((), dtype=torch.int64, device=taps[0].credit.param.device)
        self._counts = {axis: zero.clone() for axis in {axis for _, axis in self._own}}

    def take(self, finite: Tensor) -> None:
        """The recent rows of a step; with ``finite`` False (0-d) they are not remembered."""
        places: dict[tuple[str, int], Tensor] = {}
        for stack, ring in zip(self._stacks, self._rings, strict=True):
            axis = stack.taps[0].credit.axis
            for i in range(max(len(tap.recent) for tap in stack.taps)):
                met = [j for j, tap in enumerate(stack.taps) if i < len(tap.recent)]
                rows = [stack.taps[j].recent[i][0] for j in met]
                if (axis, i) not in places:
                    live = stack.taps[met[0]].recent[i][1]
                    places[axis, i] = self._places(self._counts[axis], live & finite)
                if len(met) == len(stack.taps) and len(rows[0]) <= _FEW_ROWS:
                    ring.index_copy_(1, places[axis, i], torch.stack(rows))
                    continue
                for j, some in zip(met, rows, strict=True):
                    ring[j].index_copy_(0, places[axis, i], some)
            for tap in stack.taps:
                tap.recent = []

    def _places(self, count: Tensor, live: Tensor) -> Tensor:
        nth = count + live.cumsum(0) - 1
        count += live.sum()
        return torch.where(live, nth % self._size, self._size)

    def in_order(self) -> list[Tensor]:
        """(4 r, n) of each linear, the newest last, zero in front where fewer have come."""
        slots = torch.arange(self._size, device=self._rings[0].device)
        order = {axis: (count + slots) % self._size for axis, count in self._counts.items()}
        return [ring.index_select(0, order[axis]) for ring, axis in self._own]

    def rows(self) -> list[Tensor]:
        """Those that have come, (at most 4 r, n); it waits for the device."""
        counts = {axis: min(int(count), self._size) for axis, count in self._counts.items()}
        return [
            rows[self._size - counts[axis] :]
            for rows, (_, axis) in zip(self.in_order(), self._own, strict=True)
        ]

    def restore(self, rows: Sequence[Tensor | None]) -> None:
        """What ``rows`` gave; None: no rows have come."""
        for (ring, axis), some in zip(self._own, rows, strict=True):
            ring.zero_()
            count = 0 if some is None else len(some)
            if some is not None:
                ring[:count].copy_(some)
            self._counts[axis].fill_(count)
