"""The contract once more, in NumPy and float64, sharing no code with the package.

Words are computed with Python-sized unsigned integers, normals by the formula in float64, bases by
Gram-Schmidt in extended precision instead of Householder QR.
"""

from __future__ import annotations

import math

import numpy as np
import torch

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counter (N, 4), key of two words -> (N, 4), uint64 arrays of 32-bit words."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0 = c[0] * np.uint64(0xD2511F53)
        p1 = c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> _SHIFT) ^ c[1] ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c[3] ^ np.uint64(k1),
            p0 & _LOW,
        ]
        k0 = (k0 + 0x9E3779B9) % 2**32
        k1 = (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, axis=1)


def words(seed: int, draw: int, stream: int, elements: np.ndarray) -> np.ndarray:
    """The 32-bit word of each element index: word e % 4 of block e // 4."""
    elements = np.asarray(elements, dtype=np.uint64)
    block = elements // np.uint64(4)
    counter = np.stack(
        [
            block & _LOW,
            block >> _SHIFT,
            np.full_like(block, stream),
            np.full_like(block, draw % 2**32),
        ],
        axis=1,
    )
    seed %= 2**64
    table = philox(counter, (seed % 2**32, seed // 2**32))
    return table[np.arange(len(elements)), (elements % np.uint64(4)).astype(int)]


def normals(seed: int, draw: int, stream: int, elements: np.ndarray) -> np.ndarray:
    """Standard normals in float64; u and t are the contract's fp32 numbers."""
    elements = np.asarray(elements, dtype=np.uint64)
    even = elements - elements % np.uint64(2)
    a = words(seed, draw, stream, even) >> np.uint64(8)
    b = words(seed, draw, stream, even + np.uint64(1)) >> np.uint64(8)
    u = np.float32(a.astype(np.float64) * 2.0**-24 + 2.0**-25).astype(np.float64)
    angle = 2 * np.pi * b.astype(np.float64) * 2.0**-24
    radius = np.sqrt(-2 * np.log(u))
    return np.where(elements % np.uint64(2) == 0, radius * np.cos(angle), radius * np.sin(angle))


def noise(seed: int, draw: int, stream: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The normals of a whole tensor, float64."""
    numel = math.prod(shape)
    return torch.from_numpy(normals(seed, draw, stream, np.arange(numel))).reshape(shape)


def row_noise(seed: int, draw: int, stream: int, rows: list[int], columns: int) -> torch.Tensor:
    """Rows of a matrix of normals that is ``columns`` wide, float64; any row below 2**64 / columns.

    The elements of a row are counted in Python's own integers.
    """
    elements = [row * columns + column for row in rows for column in range(columns)]
    values = normals(seed, draw, stream, np.array(elements, dtype=np.uint64))
    return torch.from_numpy(values).reshape(len(rows), columns)


def core(
    seed: int, draw: int, stream: int, rank: int, coeff: list[float], mu: float
) -> torch.Tensor:
    """mu sum_k coeff[k] Z_(draw + k), float64 (r, r)."""
    return mu * sum(c * noise(seed, draw + k, stream, (rank, rank)) for k, c in enumerate(coeff))


def scale(u: torch.Tensor, v: torch.Tensor) -> float:
    return float(np.float32(np.sqrt(np.float64(u.shape[0]) * v.shape[0]) / u.shape[1]))


def gram_schmidt(z: np.ndarray) -> np.ndarray:
    """Orthonormal columns in extended precision, each pass done twice; diag(R) > 0 by itself."""
    done: list[np.ndarray] = []
    for column in z.T.astype(np.longdouble):
        for _ in range(2):
            for q in done:
                column = column - q * (q @ column)
        done.append(column / np.sqrt(column @ column))
    return np.stack(done, axis=1)


def basis(seed: int, window: int, stream: int, rows: int, rank: int) -> np.ndarray:
    """The basis of the fp32 normals, (rows, rank)."""
    z = normals(seed, window, stream, np.arange(rows * rank)).astype(np.float32)
    return gram_schmidt(z.reshape(rows, rank))


def round_stochastic(value: float, word: int, dtype: torch.dtype) -> float:
    """One fp32 number to 16 bits, in exact arithmetic on Python floats."""
    mantissa, lowest, largest = {
        torch.bfloat16: (7, -126, (2 - 2.0**-7) * 2.0**127),
        torch.float16: (10, -14, 65504.0),
    }[dtype]
    if not math.isfinite(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, lowest)
    gap = 2.0 ** (exponent - mantissa)
    steps, fraction = divmod(abs(value) / gap, 1.0)
    if (word >> 8) * 2.0**-24 < fraction:
        steps += 1
    return math.copysign(min(steps * gap, largest), value)
