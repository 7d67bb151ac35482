"""perturb_dense_ as launches: tensors sorted by dtype and layout, described in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import shapes
from .launch import TYPES, described, launch
from .noise import perturb_dense_kernel
from .tables import Table


def vector(dtype: torch.dtype) -> int:
    """Elements of 16 bytes."""
    return 16 // dtype.itemsize


def run_of(tensor: Tensor) -> tuple[int, int, bool, bool]:
    """Columns, row stride, whether one run of memory, whether that is made of whole 16 bytes."""
    flat = tensor.is_contiguous()
    columns = 1 if tensor.dim() == 0 else tensor.shape[-1]
    whole = tensor.data_ptr() % 16 == 0 and tensor.numel() % vector(tensor.dtype) == 0
    return columns, columns if flat else tensor.stride(0), flat, flat and whole


class Dense:
    """perturb_dense_ on one list of tensors: a launch for each dtype and layout."""

    def __init__(self, ws: Sequence[Tensor], streams: Sequence[int]) -> None:
        shape = shapes.DENSE
        self._on = described(len(ws), w=ws[0])
        kinds: dict[tuple[torch.dtype, bool, bool], tuple[list[int], list[int]]] = {}
        self._launches: list[tuple[Table, int, int, dict[str, Any]]] = []
        items: dict[tuple[torch.dtype, bool, bool], int] = {}
        for w, stream in zip(ws, streams, strict=True):
            if not w.numel():
                continue
            columns, stride, flat, aligned = run_of(w)
            kind = w.dtype, flat, aligned
            rows, firsts = kinds.setdefault(kind, ([], []))
            rows += [w.data_ptr(), w.numel(), columns, stride, stream]
            firsts.append(items.get(kind, 0))
            block = vector(w.dtype) * shape.units * shape.steps
            items[kind] = firsts[-1] + -(-w.numel() // block)
        for kind, (rows, firsts) in kinds.items():
            dtype, flat, aligned = kind
            constants = dict(
                DTYPE=TYPES[dtype], FLAT=flat, ALIGNED=aligned, VEC=vector(dtype),
                N=shape.units, STEPS=shape.steps, num_warps=shape.warps,
            )  # fmt: skip
            table = Table(rows + firsts, ws[0].device)
            self._launches.append((table, len(firsts), items[kind], constants))

    def run(self, coeff: Tensor, rng: Tensor, stochastic: bool) -> None:
        for numbers, count, items, constants in self._launches:
            table = numbers.tensor()
            launch(
                "perturb_dense_", perturb_dense_kernel, (items,), table.device,
                table, table[5 * count :], count, coeff, coeff.shape[0], rng,
                STOCHASTIC=stochastic and constants["DTYPE"] != TYPES[torch.float32],
                on=self._on, **constants,
            )  # fmt: skip
