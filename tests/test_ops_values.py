"""What the in-place ops compute, against float64 on every backend, within the contract's bound."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from op_cases import DTYPES, SHAPES, assert_close, double, factors, linear_case, on

import subzero_kernels as sk

COEFF = [0.3, -0.2, 0.1]
SEED, DRAW, STREAM = 2**33 + 17, 2**32 - 2, sk.stream_id(sk.PURPOSE_CORE, 21)


def perturbation(u, v, coeff=COEFF, seed=SEED, draw=DRAW, stream=STREAM) -> torch.Tensor:
    """mu sum_k coeff[k] U Z_(draw + k) V^T in float64; draws wrap at 2**32, as DRAW makes them."""
    u, v = double(u, v)
    core = oracle.core(seed, draw, stream, u.shape[1], coeff, oracle.scale(u, v))
    return u @ core @ v.T


def call_arguments(device: str, coeff=COEFF) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(coeff, device=device), sk.make_rng(SEED, DRAW, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_perturb_(target, rows, columns, rank, dtype):
    w = torch.randn(rows, columns).to(dtype)
    u, v = factors(rows, columns, rank, dtype)
    added = perturbation(u, v)
    got, u, v = on(target.device, w.clone(), u, v)
    sk.perturb_(got, u, v, *call_arguments(target.device), stream=STREAM)
    assert_close(got, w.double() + added, added)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("wide_u", "wide_v"), [(True, True), (True, False), (False, True)])
def test_perturb_takes_fp32_bases_for_16_bit_weights(target, dtype, wide_u, wide_v):
    w = torch.randn(65, 34).to(dtype)
    u, v = factors(65, 34, 5, torch.float32)
    u, v = (u if wide_u else u.to(dtype)), (v if wide_v else v.to(dtype))
    added = perturbation(u, v)
    got, u, v = on(target.device, w.clone(), u, v)
    sk.perturb_(got, u, v, *call_arguments(target.device), stream=STREAM)
    assert_close(got, w.double() + added, added)


@pytest.mark.parametrize("queries", [1, 2, 9])
def test_perturb_sums_its_queries_and_their_draws_wrap(target, queries):
    coeff = torch.randn(queries).tolist()
    w = torch.randn(33, 50)
    u, v = factors(33, 50, 4, torch.float32)
    added = perturbation(u, v, coeff)
    got, u, v = on(target.device, w.clone(), u, v)
    sk.perturb_(got, u, v, *call_arguments(target.device, coeff), stream=STREAM)
    assert_close(got, w.double() + added, added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((12, 35), (20, 21)), ((35, 12), (21, 20)), ((4, 3, 5, 7), (12, 35)), ((420,), (20, 21))],
)
def test_perturb_reads_any_shape_row_major_as_the_factors_matrix(target, shape, matrix, dtype):
    w = torch.randn(shape).to(dtype)
    u, v = factors(*matrix, 6, dtype)
    added = perturbation(u, v).reshape(shape)
    got, u, v = on(target.device, w.clone(), u, v)
    sk.perturb_(got, u, v, *call_arguments(target.device), stream=STREAM)
    assert_close(got, w.double() + added, added)


def test_perturb_undoes_itself_in_fp32(target):
    """+eps, -2 eps, +eps is the paper's loop: what is left is rounding, far below the noise."""
    w = torch.randn(64, 64, device=target.device)
    u, v = on(target.device, *factors(64, 64, 8, torch.float32))
    got = w.clone()
    rng = sk.make_rng(1, 0, target.device)
    for step in (1e-3, -2e-3, 1e-3):
        before = got.clone()
        sk.perturb_(got, u, v, torch.tensor([step], device=target.device), rng, stream=3)
        assert (got - before).norm() > 1e-4
    assert (got - w).norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["perturb_", "perturb_dense_", "fold_"])
def test_stochastic_rounding_uses_the_words_of_purpose_4(target, dtype, op):
    shape, matrix = (12, 35), (20, 21)
    w = torch.randn(shape).to(dtype)
    u, v = factors(*matrix, 6, dtype)
    core = torch.randn(6, 6) * 0.1
    got, u_, v_, core_ = on(target.device, w.clone(), u, v, core)
    coeff, rng = call_arguments(target.device)
    stream = 1 << 28 | 77
    if op == "perturb_":
        added = perturbation(u, v, stream=stream).reshape(shape)
        sk.perturb_(got, u_, v_, coeff, rng, stream=stream, rounding="stochastic")
    elif op == "perturb_dense_":
        added = sum(c * oracle.noise(SEED, DRAW + k, stream, shape) for k, c in enumerate(COEFF))
        sk.perturb_dense_([got], coeff, rng, streams=[stream], rounding="stochastic")
    else:
        added = (u.double() @ core.double() @ v.double().T).reshape(shape)
        sk.fold_(got, u_, v_, core_, rng=rng, stream=stream, rounding="stochastic")
    exact = (w.double() + added).float()
    word = oracle.words(SEED, DRAW, 4 << 28 | 77, range(w.numel())).tolist()
    # A sum that is off by what the contract allows may fall on the other side of its word.
    error = 4 * 2e-3 * added.square().mean().sqrt().item()

    def rounded(offset: float) -> torch.Tensor:
        pairs = zip((exact + offset).flatten().tolist(), word, strict=True)
        values = [oracle.round_stochastic(x, int(bits), dtype) for x, bits in pairs]
        return torch.tensor(values, dtype=torch.float64).reshape(shape)

    expected = rounded(0.0)
    got = got.cpu().double()
    assert ((rounded(-error) <= got) & (got <= rounded(error))).all()
    differing = (got != expected).sum()
    # reference and cpu add in fp32: their sums differ from the exact ones in the last bits.
    assert differing <= (2 if target.backend in ("reference", "cpu") else 0.3 * w.numel())
    assert (expected != exact.to(dtype).double()).any(), "nearest would pass as well"


def test_stochastic_rounding_changes_nothing_for_fp32(target):
    w, u, v = on(target.device, torch.randn(20, 30), *factors(20, 30, 4, torch.float32))
    arguments = call_arguments(target.device)
    nearest, stochastic = w.clone(), w.clone()
    sk.perturb_(nearest, u, v, *arguments, stream=5)
    sk.perturb_(stochastic, u, v, *arguments, stream=5, rounding="stochastic")
    assert torch.equal(nearest, stochastic)


def many(device: str) -> tuple[list[torch.Tensor], ...]:
    """Matrices of different shapes, ranks and dtypes, one of them reshaped, one row-strided."""
    sizes = [(7, 129, 3), (129, 7, 7), (64, 96, 16), (20, 21, 6), (33, 40, 5), (1, 1, 1)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    dtypes.append(torch.float32)
    ws, us, vs = [], [], []
    for (rows, columns, rank), dtype in zip(sizes, dtypes, strict=True):
        u, v = on(device, *factors(rows, columns, rank, dtype))
        w = torch.randn(rows, columns).to(dtype).to(device)
        us.append(u)
        vs.append(v)
        ws.append(w)
    ws[3] = ws[3].reshape(12, 35)
    ws[4] = torch.randn(33, 64).to(dtypes[4]).to(device)[:, 8:48]
    return ws, us, vs


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_perturb_many_and_plans_equal_perturb_bit_for_bit(target, rounding):
    ws, us, vs = many(target.device)
    streams = [3 * i for i in range(len(ws))]
    coeff, rng = call_arguments(target.device)
    one, all_, reverse, planned = ([w.clone() for w in ws] for _ in range(4))
    for w, u, v, stream in zip(one, us, vs, streams, strict=True):
        sk.perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)
    sk.perturb_many_(all_, us, vs, coeff, rng, streams=streams, rounding=rounding)
    sk.perturb_many_(
        reverse[::-1], us[::-1], vs[::-1], coeff, rng, streams=streams[::-1], rounding=rounding
    )
    plan = sk.perturb_plan(planned, us, vs, streams)
    plan.perturb_(coeff, rng, rounding)
    for i, w in enumerate(ws):
        assert torch.equal(one[i], all_[i])
        assert torch.equal(one[i], reverse[i])
        assert torch.equal(one[i], planned[i])
        assert not torch.equal(one[i], w)


def test_a_plan_draws_anew_each_time(target):
    ws, us, vs = many(target.device)
    expected = [w.clone() for w in ws]
    plan = sk.perturb_plan(ws, us, vs, list(range(len(ws))))
    for draw in range(3):
        rng = sk.make_rng(4, draw, target.device)
        coeff = torch.tensor([0.1 * (draw + 1)], device=target.device)
        with torch.no_grad():
            plan.perturb_(coeff, rng)
        sk.perturb_many_(expected, us, vs, coeff, rng, streams=list(range(len(ws))))
    assert all(torch.equal(w, e) for w, e in zip(ws, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (1151,), (129, 7), (3, 5, 7), ()])
def test_perturb_dense_(target, shape, dtype):
    stream = sk.stream_id(sk.PURPOSE_DENSE, 4)
    w = torch.randn(shape).to(dtype)
    other = torch.randn(5)
    added = sum(c * oracle.noise(SEED, DRAW + k, stream, shape) for k, c in enumerate(COEFF))
    got, other_got = on(target.device, w.clone(), other.clone())
    sk.perturb_dense_(
        [other_got, got], *call_arguments(target.device), streams=[stream + 1, stream]
    )
    assert_close(got, w.double() + added, added)
    assert not torch.equal(other_got.cpu(), other)


@pytest.mark.parametrize("groups", [1, 3])
def test_core_noise_(target, groups):
    ranks, mu = [1, 5, 16], [0.5, 3.0, 11.3137]
    streams = [sk.stream_id(sk.PURPOSE_CORE, i) for i in (3, 9, 4)]
    coeff = torch.randn(groups, 4)
    base = [torch.randn(r, r) for r in ranks]
    out = [torch.full((groups, r, r), math.nan, device=target.device) for r in ranks]
    sk.core_noise_(
        out,
        on(target.device, *base),
        coeff.to(target.device),
        sk.make_rng(SEED, DRAW, target.device),
        streams=streams,
        mu=mu,
    )
    for i, rank in enumerate(ranks):
        for g in range(groups):
            added = oracle.core(SEED, DRAW, streams[i], rank, coeff[g].tolist(), mu[i])
            assert_close(out[i][g], base[i].double() + added, added)


def test_core_noise_updates_its_base_in_place(target):
    base = [torch.randn(r, r) for r in (3, 8)]
    coeff, streams, mu = torch.randn(1, 2), [1, 2], [2.0, 3.0]
    separate = [torch.empty(1, *b.shape, device=target.device) for b in base]
    shared = on(target.device, *[b.clone() for b in base])
    rng = sk.make_rng(SEED, DRAW, target.device)
    arguments = (coeff.to(target.device), rng)
    sk.core_noise_(separate, on(target.device, *base), *arguments, streams=streams, mu=mu)
    sk.core_noise_([b[None] for b in shared], shared, *arguments, streams=streams, mu=mu)
    for new, updated, old in zip(separate, shared, base, strict=True):
        assert torch.equal(new[0], updated)
        assert not torch.equal(updated.cpu(), old)


def test_a_coefficient_of_zero_leaves_the_base_as_it_is(target):
    """The cores of an evaluation: group g has s_g eps at its own query and zeros elsewhere."""
    base = torch.randn(6, 6, device=target.device)
    out = torch.empty(3, 6, 6, device=target.device)
    coeff = torch.tensor([[0.0, 0.0], [0.0, 1e-3], [0.0, -1e-3]], device=target.device)
    sk.core_noise_([out], [base], coeff, sk.make_rng(1, 5, target.device), streams=[0], mu=[4.0])
    assert torch.equal(out[0], base)
    z = oracle.noise(1, 6, 0, (6, 6))
    assert torch.allclose((out[1] - out[2]).cpu().double(), 2 * 4e-3 * z, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_fold_(target, rows, columns, rank, decay, dtype):
    w = torch.randn(rows, columns).to(dtype)
    u, v = factors(rows, columns, rank, dtype)
    core = torch.randn(rank, rank)
    added = u.double() @ core.double() @ v.double().T
    got, u, v, core = on(target.device, w.clone(), u, v, core)
    sk.fold_(got, u, v, core, decay=decay)
    assert_close(got, decay * w.double() + added, added)


def test_folding_a_zero_core_without_decay_changes_no_bit(target):
    for dtype in DTYPES:
        w = torch.randn(65, 33).to(dtype).to(target.device)
        u, v = on(target.device, *factors(65, 33, 4, dtype))
        got = w.clone()
        core = torch.zeros(4, 4, device=target.device)
        rng = sk.make_rng(1, 0, target.device)
        sk.fold_(got, u, v, core)
        assert torch.equal(got, w)
        sk.fold_(got, u, v, core, rounding="stochastic", rng=rng, stream=3)
        assert torch.equal(got, w)


def test_perturbed_linear_equals_the_side_path(target):
    """The two ways of applying agree: perturb W in place, or evaluate W + U C V^T beside it."""
    w, u, v, _ = linear_case(48, 32, 6, 1, torch.float32)
    x, w, u, v = on(target.device, torch.randn(5, 32), w, u, v)
    coeff, rng = call_arguments(target.device)
    core = torch.empty(1, 6, 6, device=target.device)
    base = torch.zeros(6, 6, device=target.device)
    sk.core_noise_([core], [base], coeff[None], rng, streams=[STREAM], mu=[math.sqrt(48 * 32) / 6])
    side = sk.lowrank_linear(x, w, None, u, v, core)
    sk.perturb_(w, u, v, coeff, rng, stream=STREAM)
    assert torch.allclose(side, x @ w.T, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_is_deterministic(target, dtype):
    w, u, v, core = on(target.device, *linear_case(129, 65, 9, 2, dtype))
    coeff, rng = call_arguments(target.device)
    x = torch.randn(4, 65).to(dtype).to(target.device)
    ids = torch.randint(0, 129, (4,), device=target.device)

    def run() -> list[torch.Tensor]:
        a, b, c = w.clone(), w.clone(), w.clone()
        sk.perturb_(a, u, v, coeff, rng, stream=1, rounding="stochastic")
        sk.perturb_dense_([b], coeff, rng, streams=[2], rounding="stochastic")
        sk.fold_(c, u, v, core[0], rounding="stochastic", rng=rng, stream=3)
        y = sk.lowrank_linear(x, w, None, u, v, core)
        return [a, b, c, y, sk.lowrank_embedding(ids, w, u, v, core)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_float64_is_float64_throughout(monkeypatch):
    """Only the noise and mu are fp32 numbers; everything else is exact to 1e-13."""
    monkeypatch.setenv("SUBZERO_BACKEND", "reference")
    w, u, v, core = linear_case(33, 21, 5, 2, torch.float64)
    x, bias = torch.randn(4, 21, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    z = torch.empty(5, 5, dtype=torch.float64)
    sk.normal_(z, sk.make_rng(1, 2), 3)
    expected = w + oracle.scale(u, v) * 0.25 * (u @ z @ v.T)
    got = w.clone()
    sk.perturb_(got, u, v, torch.tensor([0.25]), sk.make_rng(1, 2), stream=3)
    assert (got - expected).abs().max() < 1e-13
    sk.fold_(got, u, v, core[0].double(), decay=0.5)
    expected = 0.5 * expected + u @ core[0].double() @ v.T
    assert (got - expected).abs().max() < 1e-13
    dense = w.clone()
    noise = torch.empty_like(w)
    sk.normal_(noise, sk.make_rng(1, 2), 3)
    sk.perturb_dense_([dense], torch.tensor([0.25]), sk.make_rng(1, 2), streams=[3])
    assert (dense - (w + 0.25 * noise)).abs().max() < 1e-13
    y = sk.lowrank_linear(x, w, bias, u, v, core)
    rows = x.reshape(2, 2, 21)
    exact = rows @ w.T + rows @ v @ core.double().mT @ u.T + bias
    assert (y.reshape(exact.shape) - exact).abs().max() < 1e-13
