"""The values of the CUDA perturb_ and fold_: the contract's bound, roundings, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_cases import KINDS, arguments, basis, case, close, oracle

pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from subzero_kernels.backends import cuda  # noqa: E402
from subzero_kernels.rng import make_rng, round_stochastic, rounding_stream, words  # noqa: E402

pytestmark = pytest.mark.gpu

kinds = pytest.mark.parametrize("kind", KINDS)
# (m', n', r): odd, prime, tiny, one row, one column, every class of ranks, more than one chunk
CASES = [
    (1, 1, 1),
    (1, 131, 1),
    (131, 1, 1),
    (5, 7, 3),
    (7, 129, 7),
    (129, 1151, 16),
    (17, 1024, 8),
    (2048, 5120, 24),
    (515, 640, 33),
    (5120, 5120, 64),
    (1000, 777, 64),
    (300, 2056, 100),
    (1151, 512, 128),
    (257, 1032, 200),
    (2050, 5120, 256),
]


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)


# ---- values


@kinds
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_perturb_meets_the_bound(kind, shape):
    # Of W the added term is a few ulp for 16 bits, a thousandth for fp32, and all of it.
    for scale in (1.0, 0.0):
        w, u, v = case(*shape, kind, scale)
        coeff, rng = arguments(1e-2, -3e-3)
        exact, added = oracle(w, u, v, coeff, rng, 7)
        cuda.perturb_(w, u, v, coeff, rng, stream=7)
        close(w, exact, added)


@kinds
@pytest.mark.parametrize("shape", [(129, 1151, 16), (640, 520, 64), (300, 2056, 130)], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.999, -0.3])
def test_fold_meets_the_bound(kind, shape, decay):
    w, u, v = case(*shape, kind)
    core = 1e-2 * torch.randn(shape[2], shape[2], device="cuda")
    added = u.double() @ core.double() @ v.double().T
    exact = decay * w.double() + added
    cuda.fold_(w, u, v, core, decay=decay)
    close(w, exact, added)


@kinds
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("rank", [8, 64, 96])
def test_any_number_of_queries(kind, queries, rank):
    """Few queries make their core in each thread block, many and high ranks in a launch before."""
    w, u, v = case(200, 456, rank, kind)
    coeff = 1e-2 * torch.randn(queries, device="cuda")
    coeff[queries // 2] = 0.0
    rng = make_rng(-9, 2**32 - 2, "cuda")  # draws wrap
    exact, added = oracle(w, u, v, coeff, rng, 0x0FFFFFFF)
    cuda.perturb_(w, u, v, coeff, rng, stream=0x0FFFFFFF)
    if queries > 1:
        close(w, exact, added)
    else:
        assert torch.equal(w, exact.to(w.dtype))


@kinds
@pytest.mark.parametrize("size", ["tiny", "huge"])
def test_tiny_and_huge_updates_keep_their_relative_precision(kind, size):
    """fp16 multiplies scaled numbers: none of them may vanish or overflow."""
    w, u, v = case(160, 256, 64, kind, 0.0)
    half = w.dtype == torch.float16
    # What is added is about as large as coeff.
    coeff, rng = arguments(
        (2.0**-20 if half else 1e-20) if size == "tiny" else 1e3 if half else 1e20
    )
    exact, added = oracle(w, u, v, coeff, rng, 1)
    cuda.perturb_(w, u, v, coeff, rng, stream=1)
    close(w, exact, added)
    assert w.count_nonzero() > 0.9 * w.numel()


def test_the_two_bases_may_differ_in_dtype():
    for weight in (torch.bfloat16, torch.float16):
        for u_dtype, v_dtype in ((weight, torch.float32), (torch.float32, weight)):
            w = torch.randn(130, 264, device="cuda").to(weight)
            u, v = basis(130, 24, u_dtype), basis(264, 24, v_dtype)
            coeff, rng = arguments(1e-2)
            exact, added = oracle(w, u, v, coeff, rng, 7)
            cuda.perturb_(w, u, v, coeff, rng, stream=7)
            close(w, exact, added)


@kinds
def test_ranks_above_the_kernels_go_through_torch(kind):
    w, u, v = case(300, 280, 270, kind)
    coeff, rng = arguments(1e-2)
    exact, added = oracle(w, u, v, coeff, rng, 7)
    cuda.perturb_(w, u, v, coeff, rng, stream=7)
    close(w, exact, added)
    core = 1e-2 * torch.randn(270, 270, device="cuda")
    added = u.double() @ core.double() @ v.double().T
    exact = 0.9 * w.double() + added
    cuda.fold_(w, u, v, core, decay=0.9)
    close(w, exact, added)


def test_fp32_there_and_back_is_within_an_ulp_of_the_largest_term():
    for rank in (8, 64, 128):
        w, u, v = case(640, 1000, rank, "fp32")
        before = w.clone()
        coeff, rng = arguments(1e-3)
        _, added = oracle(w, u, v, coeff, rng, 7)
        cuda.perturb_(w, u, v, coeff, rng, stream=7)
        cuda.perturb_(w, u, v, -coeff, rng, stream=7)
        largest = torch.maximum(before.abs().double(), added.abs() + before.abs())
        ulp = torch.exp2(torch.floor(torch.log2(largest)) - 23)
        assert ((w.double() - before.double()).abs() <= ulp).all()


# ---- stochastic rounding


@pytest.mark.parametrize("kind", ["bf16", "fp16", "bf16-fp32", "fp16-fp32"])
@pytest.mark.parametrize("view", ["aligned", "odd"])
def test_stochastic_rounding_decides_as_the_reference(kind, view):
    """Wherever the error of the sum cannot change the decision, which is nearly everywhere."""
    columns = 520 if view == "aligned" else 519
    w, u, v = case(150, columns, 24, kind)
    gap = 2.0**-8 if w.dtype == torch.bfloat16 else 2.0**-11
    coeff, rng = arguments(0.2 * gap, draw=11)
    exact, added = oracle(w, u, v, coeff, rng, 7)
    word = words(rng, rounding_stream(7), w.numel()).view(w.shape)
    error = 0.02 * added.norm() / math.sqrt(added.numel())
    low, high = (round_stochastic((exact + e).float(), word, w.dtype) for e in (-error, error))
    sure = low == high
    assert sure.double().mean() > 0.95
    got = w.clone()
    cuda.perturb_(got, u, v, coeff, rng, stream=7, rounding="stochastic")
    assert torch.equal(got[sure], low[sure].to(w.dtype))
    assert not torch.equal(got, exact.to(w.dtype))
    core = coeff[0] * torch.randn(24, 24, device="cuda")
    exact = 0.99 * w.double() + u.double() @ core.double() @ v.double().T
    low, high = (round_stochastic((exact + e).float(), word, w.dtype) for e in (-error, error))
    sure = low == high
    cuda.fold_(w, u, v, core, decay=0.99, rounding="stochastic", rng=rng, stream=7)
    assert torch.equal(w[sure], low[sure].to(w.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_at_the_ends_of_the_range(dtype):
    """Finite stays finite, infinite and NaN stay, zeros keep their sign: bf16 has a rule of its
    own here."""
    info = torch.finfo(dtype)
    w = torch.tensor([info.max, -info.max, math.inf, -math.inf, math.nan, 0.0, -0.0, info.tiny])
    w = w.to(dtype).repeat(64, 1).cuda()
    u, v = basis(64, 1, dtype), basis(8, 1, dtype)
    v[4:] = 0.0
    coeff, rng = arguments(1e-3 * info.max / math.sqrt(512))
    got = w.clone()
    cuda.perturb_(got, u, v, coeff, rng, stream=7, rounding="stochastic")
    assert got[:, :2].isfinite().all() and got[:, 4].isnan().all()
    assert torch.equal(got[:, 5:], w[:, 5:])
    cuda.fold_(w, u, v * 0, torch.ones(1, 1, device="cuda"), rounding="stochastic", rng=rng)
    assert torch.equal(w[:, :4].cpu(), w[:1, :4].cpu().expand(64, 4))
    assert w[0, 0] == info.max and w[0, 2] == math.inf and w[0, 3] == -math.inf


# ---- layouts


def layouts(rows: int, columns: int, dtype: torch.dtype):
    """(name, buffer, view of it that holds rows x columns elements)."""

    def buffer(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    wide = buffer(rows, columns + 16)
    yield "rows apart by an aligned stride", wide, wide[:, 8 : columns + 8]
    odd = buffer(rows, columns + 5)
    yield "rows apart by an odd stride", odd, odd[:, 3 : columns + 3]
    flat = buffer(rows * columns + 9)
    yield "a misaligned run", flat, flat[1 : rows * columns + 1]
    cube = buffer(rows // 2, 2, columns)
    yield "three dimensions", cube, cube
    narrow = buffer(rows * 2, columns // 2 + 6)
    yield "rows of its own, apart", narrow, narrow[:, 2 : columns // 2 + 2]


@kinds
@pytest.mark.parametrize("op", ["perturb_", "fold_"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_layout_gives_the_bits_of_a_contiguous_matrix_and_touches_nothing_else(
    kind, op, rounding
):
    rows, columns, rank = 130, 264, 24
    _, u, v = case(rows, columns, rank, kind)
    coeff, rng = arguments(1e-2)
    core = 1e-2 * torch.randn(rank, rank, device="cuda")

    def run(w: torch.Tensor) -> None:
        if op == "perturb_":
            cuda.perturb_(w, u, v, coeff, rng, stream=7, rounding=rounding)
        else:
            cuda.fold_(w, u, v, core, decay=0.9, rounding=rounding, rng=rng, stream=7)

    for name, buffer, view in layouts(rows, columns, KINDS[kind][0]):
        expected = view.reshape(rows, columns).clone()
        run(expected)
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        torch.as_strided(inside, view.shape, view.stride(), view.storage_offset()).fill_(True)
        untouched = buffer[~inside].clone()
        run(view)
        assert torch.equal(view.reshape(rows, columns), expected), name
        assert torch.equal(buffer[~inside], untouched), name


@kinds
def test_bases_of_any_stride_and_alignment(kind):
    w, u, v = case(130, 264, 24, kind)
    coeff, rng = arguments(1e-2)
    expected = w.clone()
    cuda.perturb_(expected, u, v, coeff, rng, stream=7)
    for gap, first in ((8, 8), (6, 2), (5, 3)):
        wide = [
            torch.full((len(t), 24 + gap), math.nan, device="cuda", dtype=t.dtype) for t in (u, v)
        ]
        a, b = (
            (t[:, first : first + 24] for t in wide) if first < gap else (t[:, :24] for t in wide)
        )
        a.copy_(u), b.copy_(v)
        got = w.clone()
        cuda.perturb_(got, a, b, coeff, rng, stream=7)
        assert torch.equal(got, expected), (gap, first)
