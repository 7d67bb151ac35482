"""The reshape rule."""

from __future__ import annotations

import math

import pytest

from subzero_kernels import factor_shape


@pytest.mark.parametrize(
    ("shape", "rule", "expected"),
    [
        ((4096, 11008), "none", (4096, 11008)),
        ((64, 32, 3, 3), "none", (64, 288)),
        ((8, 64, 128), "none", (512, 128)),
        ((8, 100, 128), "none", (800, 128)),
        ((2, 3, 5000), "none", (6, 5000)),
        ((2, 2, 2), "none", (2, 4)),
        ((7,), "none", (1, 7)),
        ((), "none", (1, 1)),
        ((8, 4096), "square", (128, 256)),
        ((4096, 8), "square", (128, 256)),
        ((36,), "square", (6, 6)),
        ((1151,), "square", (1, 1151)),
        ((13, 17), "square", (13, 17)),
        ((1, 1), "square", (1, 1)),
        ((8, 4096), "grouped", (128, 256)),
        ((4096, 8), "grouped", (256, 128)),
        ((4, 12), "grouped", (8, 6)),
        ((6, 35), "grouped", (30, 7)),
        ((3, 7), "grouped", (3, 7)),
        ((2, 3, 5000), "grouped", (150, 200)),
    ],
)
def test_factor_shape(shape, rule, expected):
    assert factor_shape(shape, rule) == expected


@pytest.mark.parametrize("rule", ["square", "grouped"])
def test_the_result_is_the_best_of_all_candidates(rule):
    for rows in range(1, 40):
        for columns in range(1, 40):
            got = factor_shape((rows, columns), rule)
            numel = rows * columns
            pairs = [(a, numel // a) for a in range(1, numel + 1) if numel % a == 0]
            if rule == "grouped":
                pairs = [(a, b) for a, b in pairs if rows % a == 0 or columns % b == 0]
            best = min(max(pair) / min(pair) for pair in pairs)
            assert math.prod(got) == numel
            assert max(got) / min(got) == best
            if rule == "square":
                assert got[0] <= got[1]
            else:
                assert got in pairs


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        ((2, 3), "cube", "rule: expected one of none, square, grouped, got 'cube'"),
        ((2, 0), "none", "shape: expected sizes of at least 1, got (2, 0)"),
    ],
)
def test_errors(shape, rule, message):
    with pytest.raises(ValueError) as caught:
        factor_shape(shape, rule)
    assert str(caught.value).startswith(message)
