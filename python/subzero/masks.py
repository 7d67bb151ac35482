"""Attention masks of transformers in a captured step.

transformers gives up the mask, and so takes the causal kernel, where a batch has no padding and no
packed sequences. It reads the batch to find out, and cannot while a graph is captured. Whether
sequences are packed is known without reading where a batch brings no position ids.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class PackedAsBefore:
    """In front of transformers' look for packed sequences: asks it, then repeats what it found."""

    def __init__(self, look: Any) -> None:
        self._look = look
        self._found_none: list[bool] = []
        self._repeats = False

    def __call__(self, position_ids: Any) -> Any:
        if self._repeats and self._found_none and self._found_none.pop(0):
            return None
        found = self._look(position_ids)
        if not self._repeats:
            self._found_none.append(found is None)
        return found

    def repeat(self) -> None:
        """From now on: the answers of the forwards before, in their order."""
        self._repeats = True


@contextmanager
def packed_as_before(batch: Any) -> Iterator[PackedAsBefore]:
    """Around a rehearsal of a step and its capture, with ``repeat`` between the two."""
    batches = batch if isinstance(batch, list) else [batch]
    masking: Any = sys.modules.get("transformers.masking_utils")
    look = getattr(masking, "find_packed_sequence_indices", None)
    front = PackedAsBefore(look)
    if look is None or any(isinstance(b, Mapping) and "position_ids" in b for b in batches):
        yield front
        return
    masking.find_packed_sequence_indices = front
    try:
        yield front
    finally:
        masking.find_packed_sequence_indices = look
