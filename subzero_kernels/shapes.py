"""The reshape rule: as which matrix a parameter of any shape is perturbed.

The ops view a parameter row-major as an (m', n') matrix with m' * n' = numel. The noise mu U Z V^T
costs r (m' + n') numbers of basis, least where m' and n' are close, and a rank needs r <= min(m',
n').
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RULES = ("none", "square", "grouped")


def _closest_factors(number: int) -> tuple[int, int]:
    """(a, b) with a * b = number and b - a >= 0 least; a prime gives (1, number)."""
    small = math.isqrt(number)
    while number % small:
        small -= 1
    return small, number // small


def _split_dimensions(shape: Sequence[int]) -> tuple[int, int]:
    """The most nearly square split of the dimensions into leading rows and trailing columns."""
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=lambda split: max(split) / min(split))


def _group(rows: int, columns: int) -> tuple[int, int]:
    """(rows / g, columns g) or (rows g, columns / g) for the integer g closest to square."""
    candidates = [(rows, columns)]
    candidates += [(rows // g, columns * g) for g in range(2, rows + 1) if rows % g == 0]
    candidates += [(rows * g, columns // g) for g in range(2, columns + 1) if columns % g == 0]
    return min(candidates, key=lambda split: max(split) / min(split))


def factor_shape(shape: Sequence[int], rule: str = "none") -> tuple[int, int]:
    """The (m', n') as which a parameter of ``shape`` is perturbed, row-major; m' n' = numel.

    none     Two dimensions stay as they are. More are split where it comes closest to square:
             (out, in, kh, kw) becomes (out, in kh kw) or (out in, kh kw). One gives (1, numel).
    square   The closest pair of factors of numel, m' <= n', as the paper (arXiv 2410.08989) does
             for LoRA, prefix and prompt tensors: (8, 4096) becomes (128, 256).
    grouped  As "none", then rows are joined or split by the integer g that comes closest to
             square: (m / g, n g) or (m g, n / g). A side path can evaluate that exactly.

    A prime numel gives (1, n) under "square": only rank 1 fits, so take dense noise there. Of equal
    splits the first wins: fewer leading dimensions under "none", smaller g under "grouped".

    Args:
        shape: sizes of the parameter, all at least 1.
        rule: "none", "square" or "grouped".

    Raises:
        ValueError: an unknown rule or an empty parameter.

    Example:
        >>> factor_shape((8, 4096), "square")
        (128, 256)
    """
    if rule not in RULES:
        raise ValueError(
            f"rule: expected one of {', '.join(RULES)}, got {rule!r}; pass one of these"
        )
    sizes = [int(size) for size in shape]
    numel = math.prod(sizes)
    if numel < 1:
        raise ValueError(
            f"shape: expected sizes of at least 1, got {tuple(sizes)}; leave empty parameters out"
        )
    if rule == "square":
        return _closest_factors(numel)
    if len(sizes) < 2:
        rows, columns = 1, numel
    elif len(sizes) == 2:
        rows, columns = sizes
    else:
        rows, columns = _split_dimensions(sizes)
    return _group(rows, columns) if rule == "grouped" else (rows, columns)
