"""The random-number contract in readable torch.

Noise is a pure function of (seed, draw, stream, element): nothing is stored, and any device can
make it again. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
turns a counter and a key into four 32-bit words:

    key      (seed low 32, seed high 32)
    counter  (block low 32, block high 32, stream, draw)

Element ``e``, the row-major index in the whole tensor, is word ``e % 4`` of block ``e // 4``. Words
are the same on every backend. Normals are the same within 4 ulp: here the transcendental functions
are evaluated in float64 and rounded to fp32 wherever the contract holds an fp32 value, while native
code uses fp32 polynomials.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PURPOSE_CORE = 0
PURPOSE_DENSE = 1
PURPOSE_BASIS_U = 2
PURPOSE_BASIS_V = 3
PURPOSE_ROUNDING = 4
PURPOSE_ACTIVATION = 5

_PURPOSES = 6
_INDEX_BITS = 28
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_MASK32 = 0xFFFFFFFF

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def stream_id(purpose: int, index: int) -> int:
    """The uint32 stream ``purpose << 28 | index``.

    Args:
        purpose: one of the ``PURPOSE_*`` constants, 0 to 5.
        index: position of the parameter in ``model.named_parameters()``, below 2**28.

    Raises:
        ValueError: a number out of its range.
    """
    if not 0 <= purpose < _PURPOSES:
        raise ValueError(
            f"purpose: expected 0 to {_PURPOSES - 1}, got {purpose}; "
            "use one of the PURPOSE_ constants"
        )
    if not 0 <= index <= _INDEX_MASK:
        raise ValueError(
            f"index: expected 0 <= index < 2**{_INDEX_BITS}, got {index}; "
            "use the parameter's position in named_parameters()"
        )
    return purpose << _INDEX_BITS | index


def rounding_stream(stream: int) -> int:
    """The stream whose words round the weight of ``stream``: same index, purpose 4."""
    return PURPOSE_ROUNDING << _INDEX_BITS | (stream & _INDEX_MASK)


def make_rng(seed: int, draw: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The int64 tensor ``[seed, draw]`` that every op takes as ``rng``.

    Args:
        seed: any 64-bit number, -2**63 <= seed < 2**64; a seed and seed - 2**64 are the same.
        draw: 0 <= draw < 2**32, the first draw that the op reads; it reads K of them.
        device: where the data of the op lives.

    Returns:
        int64 tensor of shape (2,).

    Raises:
        ValueError: a number out of its range.
    """
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed: expected -2**63 <= seed < 2**64, got {seed}; take a 64-bit seed")
    if not 0 <= draw <= _MASK32:
        raise ValueError(f"draw: expected 0 <= draw < 2**32, got {draw}; take a 32-bit draw")
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    rng = torch.empty(2, dtype=torch.int64, device=device)
    for entry, number in zip(rng.unbind(), (signed, draw), strict=True):
        entry.fill_(number)  # a kernel's argument: a copy from the host would wait for the device
    return rng


def _philox_rounds(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds on four broadcastable int64 columns of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two 32-bit words wraps in int64, but its 64 bits are right: the mask undoes
        # the sign.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            (p0 >> 32 & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: counter int64 (N, 4), key int64 (2,) -> words int64 (N, 4) in [0, 2**32)."""
    columns = (counter & _MASK32).unbind(1)
    return torch.stack(_philox_rounds(columns, (key & _MASK32).unbind(0)), dim=1)


def _block_words(rng: Tensor, stream: int, block: Tensor, draw_offset: int | Tensor) -> Tensor:
    """Words (*block.shape, 4) of int64 block indices; rng is read on its device, no sync."""
    counter = (
        block & _MASK32,
        block >> 32,
        torch.full_like(rng[0], stream),
        (rng[1] + draw_offset) & _MASK32,
    )
    key = (rng[0] & _MASK32, rng[0] >> 32 & _MASK32)
    return torch.stack(_philox_rounds(counter, key), dim=-1)


def _blocks(rng: Tensor, stream: int, first: int, count: int, draw_offset: int) -> Tensor:
    """Words (count, 4) of blocks first .. first + count."""
    block = torch.arange(first, first + count, dtype=torch.int64, device=rng.device)
    return _block_words(rng, stream, block, draw_offset)


def words(rng: Tensor, stream: int, numel: int, *, start: int = 0, draw_offset: int = 0) -> Tensor:
    """Raw words of elements ``start .. start + numel`` of a stream.

    Args:
        rng: int64 (2,), ``[seed, draw]``.
        stream: uint32.
        numel: number of elements.
        start: row-major index of the first one.
        draw_offset: added to the draw, modulo 2**32.

    Returns:
        int64 (numel,), each in [0, 2**32).
    """
    first = start // 4
    count = -(-(start + numel) // 4) - first
    skip = start - 4 * first
    return _blocks(rng, stream, first, count, draw_offset).reshape(-1)[skip : skip + numel]


def uniform_open(word: Tensor) -> Tensor:
    """u = fma(float(word >> 8), 2**-24, 2**-25) in (0, 1], fp32.

    float64 holds the sum exactly, so that it is rounded once, as an fma does.
    """
    return ((word >> 8).double() * 2.0**-24 + 2.0**-25).float()


def uniform_half_open(word: Tensor) -> Tensor:
    """t = float(word >> 8) * 2**-24 in [0, 1), exact in fp32."""
    return (word >> 8).float() * 2.0**-24


def _sin_cos_turns(t: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi t, fp32.

    t is reduced exactly to an eighth of a turn, so that both vanish where they should.
    """
    turns = t.double()
    quadrant = torch.round(turns * 4)
    angle = (turns - quadrant / 4) * (2 * math.pi)
    sin, cos = torch.sin(angle), torch.cos(angle)
    odd = (quadrant.long() & 1).bool()
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    sin = torch.where((quadrant.long() & 2).bool(), -sin, sin)
    cos = torch.where(((quadrant.long() + 1) & 2).bool(), -cos, cos)
    return sin.float(), cos.float()


def _box_muller(words: Tensor) -> Tensor:
    """Words (..., 4) of blocks to their normals, fp32 of the same shape."""
    pairs = words.unflatten(-1, (2, 2))
    log_u = torch.log(uniform_open(pairs[..., 0]).double()).float()
    radius = torch.sqrt(-2.0 * log_u.double()).float()
    sin, cos = _sin_cos_turns(uniform_half_open(pairs[..., 1]))
    return torch.stack((radius * cos, radius * sin), dim=-1).flatten(-2)


def normals(
    rng: Tensor, stream: int, numel: int, *, start: int = 0, draw_offset: int = 0
) -> Tensor:
    """Standard normals of elements ``start .. start + numel`` of a stream, by Box and Muller.

    The word pairs (w0, w1) and (w2, w3) of a block, called (a, b), give in fp32

        u = fma(float(a >> 8), 2**-24, 2**-25)        t = float(b >> 8) * 2**-24
        z_even = sqrt(-2 ln u) cos(2 pi t)            z_odd = sqrt(-2 ln u) sin(2 pi t)

    Args and draw as in :func:`words`.

    Returns:
        fp32 (numel,).
    """
    first = start // 4
    count = -(-(start + numel) // 4) - first
    block = _box_muller(_blocks(rng, stream, first, count, draw_offset))
    skip = start - 4 * first
    return block.reshape(-1)[skip : skip + numel]


def row_normals(
    rng: Tensor, stream: int, rows: Tensor, columns: int, *, draw_offset: int | Tensor = 0
) -> Tensor:
    """Chosen rows of the normals of a stream that is read as a matrix of ``columns`` columns.

    Row i is elements ``i * columns`` to ``(i + 1) * columns`` of :func:`normals`; all rows are made
    in one pass, wherever they begin in their first block.

    Args:
        rng: int64 (2,), ``[seed, draw]``.
        stream: uint32.
        rows: int64 (N,), each >= 0, with ``(row + 1) * columns < 2**63``, on the device of rng.
        columns: elements of a row.
        draw_offset: added to the draw, modulo 2**32; a tensor of no dimension is read on its
            device.

    Returns:
        fp32 (N, columns).
    """
    first = rows * columns
    # A row that begins with the last word of a block touches this many.
    count = (columns + 6) // 4
    block = (first >> 2)[:, None] + torch.arange(count, device=rows.device)
    z = _box_muller(_block_words(rng, stream, block, draw_offset)).flatten(1)
    skip = first & 3
    return z.gather(1, skip[:, None] + torch.arange(columns, device=rows.device))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, written as bits: torch's pow and ldexp may go through fp32."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def round_stochastic(value: Tensor, word: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to ``dtype`` away from zero with the probability that makes the mean exact.

    With lo <= |value| < hi the neighbours in ``dtype``, the result is hi iff
    ``float(word >> 8) * 2**-24 < (|value| - lo) / (hi - lo)``. Representable values stay, what
    would overflow becomes the largest finite number, NaN and infinities pass. fp32 and float64
    targets are returned as they are.

    Args:
        value: fp32, any shape.
        word: int64 words, same shape.
        dtype: target.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    info = torch.finfo(dtype)
    # In float64 every fp32 number is normal and every step below is exact.
    size = value.double().abs()
    exponent = torch.frexp(size).exponent.clamp(min=math.frexp(info.tiny)[1])
    gap = _power_of_two(exponent + math.frexp(info.eps / 2)[1] - 1)
    steps = size / gap
    low = torch.floor(steps)
    up = uniform_half_open(word).double() < steps - low
    rounded = ((low + up) * gap).clamp(max=info.max)
    rounded = torch.copysign(rounded, value.double()).to(dtype)
    return torch.where(torch.isfinite(value), rounded, value.to(dtype))


def orthonormal_basis(
    rows: int,
    rank: int,
    *,
    seed: int,
    window: int,
    stream: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A random basis with orthonormal columns, the same on every machine.

    QR in float64 of the (rows, rank) fp32 normals of ``stream`` at draw ``window``; columns are
    flipped so that diag(R) > 0, and rounded once to ``dtype``. In float64 the choice of QR
    algorithm does not reach the fp32 bits.

    Args:
        rows: m' or n' of the weight's factor shape.
        rank: number of columns, 1 <= rank <= rows.
        seed: as in :func:`make_rng`.
        window: index of the window, the draw of the normals.
        stream: ``stream_id(PURPOSE_BASIS_U, index)`` or ``stream_id(PURPOSE_BASIS_V, index)``.
        dtype: fp32, bf16, fp16 or float64.
        device: where the basis is made and stays.

    Returns:
        (rows, rank) of ``dtype``, contiguous.

    Raises:
        ValueError: a number out of its range.
    """
    if not 1 <= rank <= rows:
        raise ValueError(
            f"rank: expected 1 <= rank <= {rows} rows, got {rank}; use min(rank, rows, columns)"
        )
    noise = torch.empty(rows, rank, dtype=torch.float32, device=device)
    torch.ops.subzero.normal_.default(noise, make_rng(seed, window, device), stream)
    q, r = torch.linalg.qr(noise.double())
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    return (q * sign).to(dtype).contiguous()
