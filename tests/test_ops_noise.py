"""Noise on activations: what add_noise_ and noise_outer_ compute and where they write."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from op_cases import DTYPES, assert_close, on

import subzero_kernels as sk
from subzero_kernels.rng import row_normals

SEED, DRAW, STREAM = 2**33 + 17, 2**32 - 2, sk.stream_id(sk.PURPOSE_ACTIVATION, 21)
# Every place of a block to begin at, a row twice, and elements whose block needs its high 32 bits.
ROWS = [0, 1, 2, 3, 7, 2, 2**31 + 1, 2**40 + 3, 2**44 - 1, 2**44 + 5]
N = len(ROWS)
COLUMNS = [1, 3, 4, 7, 129, 1151]


def noise(columns: int, query: int = 0, rows: list[int] = ROWS) -> torch.Tensor:
    """z_(draw + query)[rows], float64."""
    return oracle.row_noise(SEED, DRAW + query, STREAM, rows, columns)


def common(device: str, rows: list[int] = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows, device=device), sk.make_rng(SEED, DRAW, device)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("columns", COLUMNS)
def test_row_normals_are_the_streams_own(columns):
    rows, rng = common("cpu")
    for query in (0, 1, 5):  # from 2 on the draw wraps
        for offset in (query, torch.tensor(query)):
            z = row_normals(rng, STREAM, rows, columns, draw_offset=offset)
            assert z.dtype == torch.float32 and z.shape == (N, columns)
            assert torch.allclose(z.double(), noise(columns, query), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_add_noise_(target, columns, dtype):
    query = [0, 3, 2**32 - 1, -1]
    y, scale = torch.randn(4, N, columns).to(dtype), torch.randn(4, N)
    added = scale[..., None].double() * torch.stack([noise(columns, q) for q in query])
    got, scale = on(target.device, y.clone(), scale)
    rows, rng = common(target.device)
    sk.add_noise_(got, scale, torch.tensor(query, device=target.device), rows, rng, stream=STREAM)
    assert_close(got, y.double() + added, added)
    # The bound holds for each row too: a wrong one may be small beside the others.
    for g in range(4):
        for i in range(N):
            assert_close(got[g, i], y[g, i].double() + added[g, i], added[g, i])


@pytest.mark.parametrize("columns", [7, 64])
def test_the_noise_is_normal_s_bit_for_bit(target, columns):
    z = torch.empty(50, columns, device=target.device)
    y = torch.zeros(1, 50, columns, device=target.device)
    rows, rng = common(target.device, list(range(50)))
    sk.normal_(z, rng, STREAM)
    sk.add_noise_(y, torch.ones_like(y[..., 0]), rows[:1], rows, rng, stream=STREAM)
    assert torch.equal(y[0], z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_whose_scale_is_zero_keeps_its_bits(target, dtype):
    y = torch.randn(2, N, 9).to(dtype).to(target.device)
    special = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-7, -1e-7, 1.0]
    y[0, 2] = y[1, 5] = torch.tensor(special).to(dtype)
    # A signalling NaN with a payload, and a subnormal: arithmetic would make others of them.
    bits(y)[0, 2, :2] = torch.tensor([0x7F810203 if dtype == torch.float32 else 0x7F83, 1])
    before = bits(y).clone()
    scale = torch.ones(2, N, device=target.device)
    scale[0, 2], scale[1, 5] = 0.0, -0.0
    rows, rng = common(target.device)
    sk.add_noise_(y, scale, rows[:2], rows, rng, stream=STREAM)
    same = (bits(y) == before).all(2)
    assert torch.equal(same, scale == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", ["later groups", "columns", "rows", "groups inside", "one group"]
)
def test_add_noise_writes_a_view_as_if_it_were_contiguous_and_nothing_else(target, layout, dtype):
    buffer = torch.full((4, N, 40), math.nan, dtype=dtype, device=target.device)
    view = {
        "later groups": lambda: buffer[1:],
        "columns": lambda: buffer[:3, :, 5:18],
        "rows": lambda: buffer[:, 1::2],
        "groups inside": lambda: buffer.view(N, 4, 40)[:, 1:3, 3:36].transpose(0, 1),
        "one group": lambda: buffer[2:3, 3:7, :7],
    }[layout]()
    view.copy_(torch.randn(view.shape))
    plain = view.clone(memory_format=torch.contiguous_format)
    scale = torch.randn(view.shape[:2], device=target.device)
    rows, rng = common(target.device)
    query, rows = rows[: view.shape[0]], rows[: view.shape[1]]
    before = plain.clone()
    for y in (view, plain):
        sk.add_noise_(y, scale, query, rows, rng, stream=STREAM)
    assert torch.equal(view, plain) and not torch.equal(plain, before)
    assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def test_a_rows_noise_depends_on_no_other_row(target):
    y = torch.randn(3, N, 33, device=target.device)
    scale = torch.randn(3, N, device=target.device)
    rows, rng = common(target.device)
    whole = y.clone()
    sk.add_noise_(whole, scale, rows[:3], rows, rng, stream=STREAM)
    for g in range(3):
        for i in (1, 8):
            one = y[g : g + 1, i : i + 1].clone()
            sk.add_noise_(
                one,
                scale[g : g + 1, i : i + 1].clone(),
                rows[g : g + 1],
                rows[i : i + 1],
                rng,
                stream=STREAM,
            )
            assert torch.equal(one[0, 0], whole[g, i])


OUTER = [
    (1, 1, 1, 1),
    (7, 3, N, 2),
    (129, 1, N, 3),
    (3, 129, 4, 1),
    (1151, 17, N, 2),
    (65, 70, 9, 5),
]


def outer_case(columns: int, width: int, count: int, queries: int, dtype: torch.dtype):
    """weight with zeros in it, a, the rows, and the term that is added, float64."""
    rows = ROWS[:count]
    weight = torch.randn(queries, count) * (torch.rand(queries, count) < 0.7)
    weight[-1, 0] = 1.0  # something is added
    a = torch.randn(count, width).to(dtype)
    summed = sum(weight[k, :, None].double() * noise(columns, k, rows) for k in range(queries))
    return weight, a, rows, summed.T @ a.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "width", "count", "queries"), OUTER)
def test_noise_outer_(target, columns, width, count, queries, dtype):
    """Into memory full of NaN, which beta = 0 must not read."""
    weight, a, rows, added = outer_case(columns, width, count, queries, dtype)
    out = torch.full((columns, width), math.nan, device=target.device)
    weight, a = on(target.device, weight, a)
    rows, rng = common(target.device, rows)
    sk.noise_outer_(out, weight, a, rows, rng, stream=STREAM)
    assert_close(out, added, added)


@pytest.mark.parametrize("beta", [1.0, 0.9, -0.5])
@pytest.mark.parametrize(("columns", "width", "count", "queries"), OUTER)
def test_noise_outer_adds_to_beta_times_out(target, columns, width, count, queries, beta):
    weight, a, rows, added = outer_case(columns, width, count, queries, torch.float32)
    out = torch.randn(columns, width)
    got, weight, a = on(target.device, out.clone(), weight, a)
    rows, rng = common(target.device, rows)
    sk.noise_outer_(got, weight, a, rows, rng, stream=STREAM, beta=beta)
    assert_close(got, beta * out.double() + added, added)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_noise_outer_over_more_rows_than_are_made_at_a_time(target, beta):
    rows = list(range(5, 2505))
    weight, a = torch.randn(1, 2500), torch.randn(2500, 6)
    added = (weight[0, :, None].double() * noise(7, 0, rows)).T @ a.double()
    out = torch.randn(7, 6)
    got, weight, a = on(target.device, out.clone(), weight, a)
    rows, rng = common(target.device, rows)
    sk.noise_outer_(got, weight, a, rows, rng, stream=STREAM, beta=beta)
    assert_close(got, beta * out.double() + added, added)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_noise_outer_writes_a_view_as_if_it_were_contiguous_and_nothing_else(target, beta):
    buffer = torch.full((20, 50), math.nan, device=target.device)
    view = buffer[2:15, 3:44]
    view.copy_(torch.randn(13, 41))
    plain = view.clone(memory_format=torch.contiguous_format)
    wide = torch.randn(N, 50, device=target.device)
    weight = torch.randn(2, N, device=target.device)
    rows, rng = common(target.device)
    sk.noise_outer_(view, weight, wide[:, 5:46], rows, rng, stream=STREAM, beta=beta)
    a = wide[:, 5:46].contiguous()
    sk.noise_outer_(plain, weight, a, rows, rng, stream=STREAM, beta=beta)
    if target.device == "cpu":
        assert torch.equal(view, plain)
    else:  # another layout may take another of cuBLAS's kernels
        assert torch.allclose(view, plain, atol=1e-5)
    assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def test_a_query_without_weight_leaves_the_others_as_they_are(target):
    weight, a = on(target.device, torch.randn(1, N), torch.randn(N, 5))
    rows, _ = common(target.device)
    with_it, without = (torch.empty(9, 5, device=target.device) for _ in range(2))
    padded = torch.cat((torch.zeros_like(weight), weight))
    sk.noise_outer_(with_it, padded, a, rows, sk.make_rng(1, 7, target.device), stream=STREAM)
    sk.noise_outer_(without, weight, a, rows, sk.make_rng(1, 8, target.device), stream=STREAM)
    assert torch.equal(with_it, without) and with_it.any()


def test_noise_outer_credits_the_noise_that_add_noise_added(target):
    """The two ops name the same noise: row, column, query and draw."""
    queries, count, columns = 3, 6, 21
    rows, rng = common(target.device, ROWS[:count])
    z = torch.zeros(queries, count, columns, device=target.device)
    query = torch.arange(queries, device=target.device)
    sk.add_noise_(z, torch.ones_like(z[..., 0]), query, rows, rng, stream=STREAM)
    weight, a = on(target.device, torch.randn(queries, count), torch.randn(count, 4))
    out = torch.empty(columns, 4, device=target.device)
    sk.noise_outer_(out, weight, a, rows, rng, stream=STREAM)
    exact = torch.einsum("kn,knc,nr->cr", weight.double(), z.double(), a.double())
    # reference and cpu multiply in fp32; sums of bf16 parts have the contract's bound.
    bound = 1e-6 if target.backend in ("reference", "cpu") else 1e-5
    assert (out - exact).norm() < bound * exact.norm()


def test_nothing_to_add_and_nothing_to_write(target):
    rng = sk.make_rng(1, 0, target.device)
    none = torch.empty(0, dtype=torch.int64, device=target.device)
    two = torch.arange(2, device=target.device)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=target.device)

    sk.add_noise_(empty(0, 2, 3), empty(0, 2), none, two, rng, stream=1)
    sk.add_noise_(empty(2, 0, 3), empty(2, 0), two, none, rng, stream=1)
    sk.add_noise_(empty(2, 2, 0), empty(2, 2), two, two, rng, stream=1)
    sk.noise_outer_(empty(0, 3), empty(1, 2), empty(2, 3), two, rng, stream=1)
    sk.noise_outer_(empty(3, 0), empty(1, 2), empty(2, 0), two, rng, stream=1)
    out = torch.randn(4, 3, device=target.device)
    expected = 0.5 * out
    sk.noise_outer_(out, empty(2, 0), empty(0, 3), none, rng, stream=1, beta=0.5)
    assert torch.equal(out, expected)
    out.fill_(math.nan)
    sk.noise_outer_(out, empty(2, 0), empty(0, 3), none, rng, stream=1)
    assert not out.any()


def test_both_are_deterministic(target):
    rows, rng = common(target.device)
    y = torch.randn(3, N, 129).bfloat16().to(target.device)
    scale, a = on(target.device, torch.randn(3, N), torch.randn(N, 65))

    def run() -> list[torch.Tensor]:
        noisy, out = y.clone(), torch.ones(129, 65, device=target.device)
        sk.add_noise_(noisy, scale, rows[:3], rows, rng, stream=STREAM)
        sk.noise_outer_(out, scale, a, rows, rng, stream=STREAM, beta=0.9)
        return [noisy, out]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_is_float64_throughout(monkeypatch, dtype):
    """Only the noise consists of fp32 numbers; scale and weight may be either."""
    monkeypatch.setenv("SUBZERO_BACKEND", "auto")
    rows, rng = common("cpu")
    z = [row_normals(rng, STREAM, rows, 13, draw_offset=k).double() for k in range(2)]
    weight = torch.randn(2, N, dtype=dtype)
    y = torch.randn(2, N, 13, dtype=torch.float64)
    expected = y + weight[..., None] * torch.stack(z)
    sk.add_noise_(y, weight, torch.arange(2), rows, rng, stream=STREAM)
    assert (y - expected).abs().max() < 1e-13
    out, a = torch.randn(13, 5, dtype=torch.float64), torch.randn(N, 5, dtype=dtype)
    expected = 0.9 * out + sum((weight[k, :, None] * z[k]).T @ a.double() for k in range(2))
    sk.noise_outer_(out, weight, a, rows, rng, stream=STREAM, beta=0.9)
    assert (out - expected).abs().max() < 1e-13
