"""csrc/philox.h as the CPU module compiled it: exact words, elementary functions, statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from subzero_kernels.backends import cpu  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

INPUTS = 1 << 24
ISAS = native.build_info()["isas"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.cpu.select_isa(request.param)
    yield request.param
    native.cpu.select_isa(ISAS[0])


# Random123's kat_vectors: counter, key, words of philox4x32 with 10 rounds.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN, ids=["zeros", "ones", "pi"])
def test_words_are_random123s(isa, counter, key, expected):
    def integers(text: str) -> torch.Tensor:
        return torch.tensor([int(word, 16) for word in text.split()])

    words = cpu.philox4x32(integers(counter)[None], integers(key))
    assert torch.equal(words, integers(expected)[None])


def errors_in_ulp(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32))


def test_ln_of_every_u_is_within_an_ulp(isa):
    got = np.empty(INPUTS, np.float32)
    native.cpu.ln(first=0, count=INPUTS, out=got.ctypes.data)
    u = (np.arange(INPUTS) * 2.0**-24 + 2.0**-25).astype(np.float32)
    assert u[-1] == 1.0 and got[-1] == 0.0
    assert errors_in_ulp(got, np.log(u.astype(np.float64))).max() < 0.86  # philox.h says so


def test_sin_and_cos_of_every_t_are_within_an_ulp(isa):
    sin, cos = np.empty(INPUTS, np.float32), np.empty(INPUTS, np.float32)
    native.cpu.sincos_turns(first=0, count=INPUTS, sin=sin.ctypes.data, cos=cos.ctypes.data)
    # Both by the sine and cosine of at most an eighth of a turn, where float64 is exact enough.
    turns = np.arange(INPUTS)
    quadrant = (turns + INPUTS // 8) // (INPUTS // 4)
    angle = (turns - quadrant * (INPUTS // 4)) * (2 * np.pi / INPUTS)
    s, c = np.sin(angle), np.cos(angle)
    exact_sin = np.choose(quadrant % 4, [s, c, -s, -c])
    exact_cos = np.choose(quadrant % 4, [c, -s, -c, s])
    assert errors_in_ulp(sin, exact_sin).max() < 0.99
    assert errors_in_ulp(cos, exact_cos).max() < 0.99
    quarters = slice(0, None, INPUTS // 4)
    assert np.array_equal(sin[quarters], [0, 1, 0, -1])
    assert np.array_equal(cos[quarters], [1, 0, -1, 0])


def sample(count: int, *, seed: int = 0, draw: int = 0, stream: int = 0) -> np.ndarray:
    out = torch.empty(count)
    cpu.normal_(out, make_rng(seed, draw), stream)
    return out.numpy()


def test_a_large_sample_is_standard_normal():
    """Fixed seed; each statistic within five of its standard deviations."""
    count = 1 << 22
    z = sample(count, seed=20240817).astype(np.float64)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # mean and variance of z**k
    for power, (mean, variance) in moments.items():
        assert abs((z**power).mean() - mean) < 5 * (variance / count) ** 0.5, f"moment {power}"
    assert stats.kstest(z, "norm").pvalue > 1e-3
    # The tails, where Box and Muller's fp32 grid would show first.
    for bound in (3.0, 4.0, 4.5):
        expected = count * 2 * stats.norm.sf(bound)
        assert abs((np.abs(z) > bound).sum() - expected) < 5 * expected**0.5


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 1 << 32}, {"draw": 1}, {"stream": 1}, {"stream": 1 << 28}],
    ids=["seed", "seed high", "draw", "stream", "purpose"],
)
def test_neighbouring_sources_are_independent(other):
    count = 1 << 21
    a, b = sample(count).astype(np.float64), sample(count, **other).astype(np.float64)
    bound = 5 / count**0.5
    assert abs(np.corrcoef(a, b)[0, 1]) < bound
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < bound
    for shift in (1, 2, 3, 4):  # a source that is another one moved by some elements or blocks
        assert abs(np.corrcoef(a[shift:], b[:-shift])[0, 1]) < bound
    assert stats.kstest((a + b) / 2**0.5, "norm").pvalue > 1e-3


def test_neighbouring_elements_are_independent():
    count = 1 << 21
    z = sample(count).astype(np.float64)
    for shift in (1, 2, 3, 4, 8, 256):
        for power in (1, 2):
            head, tail = z[shift:] ** power, z[:-shift] ** power
            assert abs(np.corrcoef(head, tail)[0, 1]) < 5 / count**0.5
