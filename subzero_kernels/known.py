"""Calls on lists of tensors that were checked before, so that a loop pays for the checks once.

Checking the 726 tensors of OPT-13B's perturb_many_ and describing them to the native code takes the
host milliseconds, and a loop passes the same ones each time. What the checks say, and what a
backend makes of the lists, is a function of nothing but the addresses, shapes, strides and dtypes
of the tensors, their device and the other arguments; of requires_grad too while grad mode is on;
and of the addresses of coeff and rng only in whether they meet what is written. So a call is known
if all of this is equal to that of a call that was found right, which is compared in a third of a
millisecond, and every other call is checked in full. No tensor is kept alive.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from .overlap import region

Facts = tuple[Hashable, ...]

# Subclasses (fake, functional, sharded, ...) may keep their memory elsewhere.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_MOST = 16

_device_of = Tensor.device.__get__  # type: ignore[attr-defined]
_dtype_of = Tensor.dtype.__get__  # type: ignore[attr-defined]
_requires_grad = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Known:
    """A call that was found right: what its backend is chosen by and what each made of it."""

    def __init__(self, written: Sequence[Tensor], chosen_by: tuple[str, bool, str]) -> None:
        self.chosen_by = chosen_by
        self.prepared: dict[str, Callable[[Tensor, Tensor], None] | None] = {}
        spans = [region("", t, written=True) for t in written if t.numel()]
        spans.sort(key=lambda span: span.start)
        self._starts = [span.start for span in spans]
        # How far the memory reaches of all that start no later: column slices interleave.
        self._reach = list(accumulate((span.end for span in spans), max))

    def may_meet(self, tensor: Tensor) -> bool:
        """False if a contiguous tensor shares no memory with what is written; True if it may."""
        start = tensor.data_ptr()
        before = bisect_left(self._starts, start + tensor.nbytes)
        return before > 0 and self._reach[before - 1] > start


_known: dict[Facts, Known] = {}


def facts_of(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Facts | None:
    """All that a call on (list, ..., coeff, rng) is checked by, or None if that is not all.

    Each attribute is read of all tensors by one map, which stays in C.
    """
    *lists, coeff, rng = args
    tensors = list(chain(*lists))
    addressed = len(tensors)
    tensors += (coeff, rng)
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    devices = set(map(_device_of, tensors))
    if len(devices) > 1 or coeff.is_meta:  # where tensors have no addresses
        return None
    if torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
        return None
    try:
        return (
            op,
            *map(len, lists),
            *devices,
            tuple(map(Tensor.data_ptr, tensors[:addressed])),
            tuple(map(Tensor.size, tensors)),
            tuple(map(Tensor.stride, tensors)),
            tuple(map(_dtype_of, tensors)),
            *((name, _exact(value)) for name, value in kwargs.items()),
        )
    except RuntimeError:  # of a sparse tensor, which has neither address nor strides
        return None


def _exact(value: Any) -> Hashable:
    """An argument beside the tensors, as bits where it holds floats: -0.0 is not 0.0."""
    if isinstance(value, (list, tuple)):
        floats = any(isinstance(item, float) for item in value)
        return array("d", value).tobytes() if floats else tuple(value)
    return value


def recall(facts: Facts | None, coeff: Tensor, rng: Tensor) -> Known | None:
    """The call, if it is known and coeff and rng are apart from all that it writes."""
    known = None if facts is None else _known.get(facts)
    if known is None or known.may_meet(coeff) or known.may_meet(rng):
        return None
    return known


def remember(facts: Facts | None, known: Known) -> None:
    """Keep a call, after its checks, for those that are equal to it."""
    if facts is not None:
        if len(_known) >= _MOST:
            _known.clear()
        _known[facts] = known


def forget() -> None:
    """Check every call anew."""
    _known.clear()
