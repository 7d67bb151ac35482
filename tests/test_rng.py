"""The RNG contract: known answers, element indexing, streams, normals, rounding, bases."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from scipy import stats

import subzero_kernels as sk
from subzero_kernels import rng as contract

BF16, FP16 = torch.bfloat16, torch.float16


def filled(target, numel: int, seed: int, draw: int, stream: int, dtype=torch.float32):
    out = torch.full((numel,), math.nan, dtype=dtype, device=target.device)
    sk.normal_(out, sk.make_rng(seed, draw, target.device), stream)
    return out.cpu()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(target, counter, key, expected):
    got = sk.philox4x32(
        torch.tensor([counter], device=target.device), torch.tensor(key, device=target.device)
    )
    assert got.tolist() == [expected]


def test_philox_agrees_with_the_oracle_on_random_words(target):
    counter = torch.randint(0, 2**32, (1000, 4))
    key = torch.randint(0, 2**32, (2,))
    got = sk.philox4x32(counter.to(target.device), key.to(target.device))
    expected = oracle.philox(counter.numpy(), (int(key[0]), int(key[1])))
    assert np.array_equal(got.cpu().numpy().astype(np.uint64), expected)


def test_philox_of_no_counters_is_empty(target):
    got = sk.philox4x32(
        torch.zeros(0, 4, dtype=torch.int64, device=target.device),
        torch.zeros(2, dtype=torch.int64, device=target.device),
    )
    assert got.shape == (0, 4)


@pytest.mark.parametrize("start", [0, 1, 4, 7, 4 * 2**32 - 3])
def test_words_are_indexed_by_element_across_blocks_and_the_32_bit_border(start):
    rng = sk.make_rng(2**40 + 5, 9)
    got = contract.words(rng, 0x30000007, 11, start=start)
    expected = oracle.words(2**40 + 5, 9, 0x30000007, np.arange(start, start + 11, dtype=np.uint64))
    assert np.array_equal(got.numpy().astype(np.uint64), expected)


@pytest.mark.parametrize(
    ("seed", "draw", "stream"),
    [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (-(2**63), 3, 1 << 28), (2**32, 1, 5)],
)
def test_normals_agree_with_the_oracle(target, seed, draw, stream):
    got = filled(target, 4099, seed, draw, stream).double().numpy()
    expected = oracle.normals(seed, draw, stream, np.arange(4099))
    assert np.abs(got - expected).max() < 4e-6


def test_normals_are_exact_to_4_ulp_everywhere(target):
    got = filled(target, 1 << 18, 7, 8, 9).double().numpy()
    expected = oracle.normals(7, 8, 9, np.arange(1 << 18))
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    # The oracle's float64 angle is off by 1e-16 radius near the zeros of sin and cos.
    assert (np.abs(got - expected) <= 4 * ulp + 1e-14).all()


def test_native_backends_agree_with_the_reference_to_4_ulp(target, monkeypatch):
    got = filled(target, 1 << 18, 11, 12, 13)
    monkeypatch.setenv("SUBZERO_BACKEND", "reference")
    expected = filled(target, 1 << 18, 11, 12, 13)
    ulp = torch.from_numpy(np.spacing(expected.abs().numpy()))
    assert ((got - expected).abs() <= 4 * ulp).all()


def test_u_of_one_gives_zero_and_the_smallest_u_the_largest_normal():
    u = contract.uniform_open(torch.tensor([0, 0xFFFFFFFF]))
    assert u.tolist() == [2.0**-25, 1.0]
    t = contract.uniform_half_open(torch.tensor([0, 0xFFFFFFFF, 0x40000000]))
    assert t.tolist() == [0.0, 1 - 2.0**-24, 0.25]


def test_quarter_turns_are_exact():
    sin, cos = contract._sin_cos_turns(torch.tensor([0, 0.125, 0.25, 0.5, 0.75, 0.875]))
    half = math.sqrt(0.5)
    assert sin.tolist() == pytest.approx([0, half, 1, 0, -1, -half], abs=6e-8)
    assert cos.tolist() == pytest.approx([1, half, 0, -1, 0, half], abs=6e-8)
    assert sin[[0, 3]].abs().max() == 0 and cos[[2, 4]].abs().max() == 0


def test_an_element_does_not_depend_on_the_size_or_the_shape_of_its_tensor(target):
    rng = sk.make_rng(1, 2, target.device)
    long = filled(target, 999, 1, 2, 3)
    wide = torch.empty(7, 13, device=target.device)
    sk.normal_(wide, rng, 3)
    assert torch.equal(wide.cpu().flatten(), long[:91])
    assert torch.equal(filled(target, 1, 1, 2, 3), long[:1])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_normals_in_16_bits_are_the_fp32_normals_rounded_once(target, dtype):
    assert torch.equal(
        filled(target, 4097, 3, 4, 5, dtype), filled(target, 4097, 3, 4, 5).to(dtype)
    )


def test_normals_fill_a_row_strided_view_and_nothing_else(target):
    buffer = torch.full((9, 16), math.nan, device=target.device)
    sk.normal_(buffer[1:8, 3:14], sk.make_rng(1, 2, target.device), 3)
    inside = buffer[1:8, 3:14].cpu()
    assert torch.equal(inside.flatten(), filled(target, 77, 1, 2, 3))
    assert int(buffer.isnan().sum()) == 9 * 16 - 77


def test_samples_are_standard_normal(target):
    sample = filled(target, 1 << 21, 2024, 0, 1).double().numpy()
    n = len(sample)
    assert abs(sample.mean()) < 4 / math.sqrt(n)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((sample**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((sample**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(sample[: 1 << 18], "norm").pvalue > 1e-3


def test_neighbouring_streams_draws_seeds_and_elements_are_uncorrelated(target):
    n = 1 << 18
    base = filled(target, n, 100, 5, 7)
    others = [
        filled(target, n, 100, 5, 8),
        filled(target, n, 100, 5, 7 | 1 << 28),
        filled(target, n, 100, 6, 7),
        filled(target, n, 101, 5, 7),
        filled(target, n, 100 + 2**32, 5, 7),
        base.roll(1),
        base.roll(2),
    ]
    for other in others:
        # Squares too: Box-Muller pairs share a radius, whose dependence a correlation would miss.
        for a, b in ((base, other), (base**2, other**2)):
            correlation = torch.corrcoef(torch.stack((a, b)).double())[0, 1]
            assert abs(correlation) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_agrees_with_exact_arithmetic(dtype):
    info = torch.finfo(dtype)
    values = torch.cat(
        [
            torch.randn(300),
            torch.randn(300) * info.tiny * 2,
            torch.randn(200) * info.smallest_normal * info.eps * 3,
            torch.tensor([0.0, -0.0, info.max, -info.max, info.max * 1.0001, 3.4e38, -3.4e38]),
            torch.tensor([1e-45, -1e-45, 1.0, 1 + info.eps / 2, 1 + info.eps, -1 - info.eps / 4]),
            torch.tensor([math.inf, -math.inf]),
        ]
    )
    word = torch.randint(0, 2**32, values.shape)
    got = contract.round_stochastic(values, word, dtype)
    pairs = zip(values.tolist(), word.tolist(), strict=True)
    expected = torch.tensor(
        [oracle.round_stochastic(x, w, dtype) for x, w in pairs], dtype=torch.float64
    )
    assert got.dtype == dtype
    assert torch.equal(got.double(), expected)
    assert torch.equal(torch.signbit(got), torch.signbit(values))
    assert contract.round_stochastic(torch.tensor([math.nan]), word[:1], dtype).isnan().all()


def test_stochastic_rounding_goes_up_iff_the_word_is_below_the_fraction():
    gap = 2.0**-7
    value = torch.full((4,), 1 + 0.25 * gap)
    # float(word >> 8) * 2**-24 just below, at and above one quarter; the low 8 bits do not count.
    word = torch.tensor([0x3FFFFFFF, 0x40000000, 0x400000FF, 0])
    got = contract.round_stochastic(value, word, BF16)
    assert got.tolist() == [1 + gap, 1, 1, 1 + gap]
    assert contract.round_stochastic(-value, word, BF16).tolist() == [-1 - gap, -1, -1, -1 - gap]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_is_unbiased_and_keeps_representable_values(dtype):
    value = torch.full((1 << 16,), 1 + 0.3 * torch.finfo(dtype).eps)
    word = contract.words(sk.make_rng(5), 4 << 28, value.numel())
    mean = contract.round_stochastic(value, word, dtype).double().mean()
    deviation = torch.finfo(dtype).eps * math.sqrt(0.3 * 0.7 / value.numel())
    assert abs(mean - value[0].double()) < 4 * deviation
    kept = torch.randn(4096).to(dtype)
    assert torch.equal(contract.round_stochastic(kept.float(), word[:4096], dtype), kept)


def test_stochastic_rounding_leaves_fp32_alone():
    value = torch.randn(100)
    word = torch.zeros(100, dtype=torch.int64)
    assert torch.equal(contract.round_stochastic(value, word, torch.float32), value)


def test_streams_are_purpose_and_index():
    assert sk.stream_id(sk.PURPOSE_BASIS_V, 7) == 3 << 28 | 7
    purposes = [
        sk.PURPOSE_CORE,
        sk.PURPOSE_DENSE,
        sk.PURPOSE_BASIS_U,
        sk.PURPOSE_BASIS_V,
        sk.PURPOSE_ROUNDING,
        sk.PURPOSE_ACTIVATION,
    ]
    assert purposes == list(range(6))
    assert contract.rounding_stream(1 << 28 | 9) == 4 << 28 | 9


def test_rng_holds_seed_and_draw():
    assert sk.make_rng(2**64 - 1, 2**32 - 1).tolist() == [-1, 2**32 - 1]
    assert sk.make_rng(-5).tolist() == [-5, 0]
    assert sk.make_rng(1).dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.stream_id(6, 0), "purpose: expected 0 to 5, got 6"),
        (lambda: sk.stream_id(0, 1 << 28), "index: expected 0 <= index < 2**28, got 268435456"),
        (lambda: sk.make_rng(1 << 64), "seed: expected -2**63 <= seed < 2**64"),
        (lambda: sk.make_rng(0, 1 << 32), "draw: expected 0 <= draw < 2**32"),
        (
            lambda: sk.orthonormal_basis(4, 5, seed=0, window=0, stream=0),
            "rank: expected 1 <= rank <= 4 rows, got 5",
        ),
        (
            lambda: sk.orthonormal_basis(4, 0, seed=0, window=0, stream=0),
            "rank: expected 1 <= rank <= 4 rows, got 0",
        ),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (7, 7), (129, 16), (1151, 24)])
def test_bases_are_the_qr_of_the_contracts_normals(target, rows, rank):
    stream = sk.stream_id(sk.PURPOSE_BASIS_U, 12)
    got = sk.orthonormal_basis(
        rows, rank, seed=3, window=2, stream=stream, device=target.device
    ).cpu()
    q = got.double()
    assert torch.allclose(q.T @ q, torch.eye(rank, dtype=torch.float64), atol=5e-7)
    noise = oracle.noise(3, 2, stream, (rows, rank))
    r = q.T @ noise
    assert (torch.diagonal(r) > 0).all()
    # R is triangular: the basis spans the columns in their order.
    assert torch.tril(r, -1).abs().max() < 1e-4
    expected = oracle.basis(3, 2, stream, rows, rank)
    assert np.abs(q.numpy() - expected.astype(np.float64)).max() < 1e-5


def test_bases_match_an_independent_qr_of_the_same_normals_in_their_fp32_bits(target):
    """Gram-Schmidt in extended precision; normals of the same backend, since 4 ulp are allowed."""
    stream = sk.stream_id(sk.PURPOSE_BASIS_V, 3)
    z = filled(target, 200 * 8, 9, 1, stream).reshape(200, 8).numpy()
    expected = torch.from_numpy(oracle.gram_schmidt(z).astype(np.float32))
    got = sk.orthonormal_basis(200, 8, seed=9, window=1, stream=stream, device=target.device)
    assert (got.cpu() != expected).sum() <= 1  # a value may lie on a rounding border


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16, torch.float64])
def test_bases_are_reproducible_and_rounded_once(dtype):
    kwargs = dict(seed=5, window=1, stream=sk.stream_id(sk.PURPOSE_BASIS_U, 0))
    got = sk.orthonormal_basis(60, 5, dtype=dtype, **kwargs)
    exact = sk.orthonormal_basis(60, 5, dtype=torch.float64, **kwargs)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, exact.to(dtype))
    assert not torch.equal(
        got, sk.orthonormal_basis(60, 5, dtype=dtype, **(kwargs | {"window": 2}))
    )
