"""Tables of int64 numbers on the device: what a kernel that takes many tensors knows of each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tables that CUDA graphs read: they must outlive the graphs, which do not tell when they go.
_captured: dict[int, Tensor] = {}


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Table:
    """Numbers in device memory, for kernels on any stream.

    Made outside of a capture, it is copied once. While a CUDA graph is captured nothing can be
    copied to the device: then kernels write it, its numbers being their arguments, and do so at
    each replay. So warm up with the tensors that will be captured, or make a plan of them.
    """

    def __init__(self, numbers: list[int], device: torch.device) -> None:
        self.transient = capturing(device)
        if self.transient:
            self._tensor = torch.empty(len(numbers), dtype=torch.int64, device=device)
            _write(self._tensor, numbers)
        else:
            self._tensor = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._stream = _current_stream(device)

    def tensor(self) -> Tensor:
        """The table, kept alive for the work that the caller is about to put on its stream."""
        tensor = self._tensor
        if tensor.is_cuda and not self.transient:
            if torch.cuda.is_current_stream_capturing():
                _captured[tensor.data_ptr()] = tensor
            elif _current_stream(tensor.device) != self._stream:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


WIDTH = 16


@triton.jit(do_not_specialize=[f"n{i}" for i in range(WIDTH)])
def write_kernel(
    to,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64,
    n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    n8: tl.int64, n9: tl.int64, n10: tl.int64, n11: tl.int64,
    n12: tl.int64, n13: tl.int64, n14: tl.int64, n15: tl.int64,
):  # fmt: skip
    tl.store(to, n0)
    tl.store(to + 1, n1)
    tl.store(to + 2, n2)
    tl.store(to + 3, n3)
    tl.store(to + 4, n4)
    tl.store(to + 5, n5)
    tl.store(to + 6, n6)
    tl.store(to + 7, n7)
    tl.store(to + 8, n8)
    tl.store(to + 9, n9)
    tl.store(to + 10, n10)
    tl.store(to + 11, n11)
    tl.store(to + 12, n12)
    tl.store(to + 13, n13)
    tl.store(to + 14, n14)
    tl.store(to + 15, n15)


def _write(tensor: Tensor, numbers: list[int]) -> None:
    """Runs of WIDTH numbers; the last one overlaps its neighbour, or ends in a longer tensor."""
    if len(numbers) < WIDTH:
        whole = tensor.new_empty(WIDTH)
        _write(whole, numbers + [0] * (WIDTH - len(numbers)))
        tensor.copy_(whole[: len(numbers)])
        return
    for start in range(0, len(numbers), WIDTH):
        start = min(start, len(numbers) - WIDTH)
        write_kernel[(1,)](tensor[start:], *numbers[start : start + WIDTH], num_warps=1)


_Value = TypeVar("_Value")


class Recent(OrderedDict[Hashable, _Value]):
    """The values last asked for; what a capture made belongs to its graph and is not kept."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def get_or_make(
        self, key: Hashable, make: Callable[[], _Value], device: torch.device
    ) -> _Value:
        value = self.get(key)
        if value is not None:
            self.move_to_end(key)
            return value
        value = make()
        if not capturing(device):
            self[key] = value
            if len(self) > self._most:
                self.popitem(last=False)
        return value
