"""Launches of the CUDA perturb_ and fold_: lists, plans, streams, graphs, memory, errors."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_cases import KINDS, arguments, basis, case

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

import subzero_kernels as sk  # noqa: E402
from subzero_kernels.backends import cuda  # noqa: E402
from subzero_kernels.rng import make_rng, round_stochastic, rounding_stream, words  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)


# ---- many


def mixed_list() -> tuple[list, list, list, list]:
    """Every kind, shapes that share launches and some that do not, more than a launch holds."""
    shapes = [(64, 128, 8), (1, 77, 1), (130, 264, 24), (7, 129, 7), (512, 1024, 64), (96, 200, 70)]
    ws, us, vs = [], [], []
    for i in range(330):
        kind = list(KINDS)[0 if i < 3 else i % 7 if i % 7 < 5 else 1]
        w, u, v = case(*shapes[i % len(shapes)], kind)
        ws.append(w), us.append(u), vs.append(v)
    return ws, us, vs, list(range(330))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_matrix_gets_the_same_bits_alone_and_in_any_list(rounding):
    ws, us, vs, streams = mixed_list()
    coeff, rng = arguments(1e-2, 2e-3)
    alone = [w.clone() for w in ws]
    for w, u, v, stream in zip(alone, us, vs, streams, strict=True):
        cuda.perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)
    part = [w.clone() for w in ws[:40]]
    cuda.perturb_many_(part, us[:40], vs[:40], coeff, rng, streams=streams[:40], rounding=rounding)
    cuda.perturb_many_(ws, us, vs, coeff, rng, streams=streams, rounding=rounding)
    for i, (a, b) in enumerate(zip(alone, ws, strict=True)):
        assert torch.equal(a, b), i
    for i, (a, b) in enumerate(zip(alone, part, strict=False)):
        assert torch.equal(a, b), i


def test_a_plan_repeats_and_two_runs_are_equal():
    ws, us, vs, streams = mixed_list()
    start = [w.clone() for w in ws]
    again = [w.clone() for w in ws]
    plan = sk.perturb_plan(ws, us, vs, streams)
    with torch.no_grad():
        for draw in (5, 6):
            coeff, rng = arguments(1e-2, draw=draw)
            plan.perturb_(coeff, rng)
            sk.perturb_many_(again, us, vs, coeff, rng, streams=streams)
    assert all(torch.equal(a, b) for a, b in zip(ws, again, strict=True))
    assert not torch.equal(ws[0], start[0])


# ---- launches


def test_the_tensors_stream_and_its_order_are_kept():
    for rank in (64, 96):  # a core made by thread blocks, and in a launch before
        w, u, v = case(1024, 1024, rank, "bf16")
        coeff, rng = arguments(1e-2)
        expected = w.clone()
        cuda.perturb_(expected, u, v, coeff, rng, stream=7)
        expected.mul_(2.0)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = torch.empty_like(coeff).copy_(coeff)
            cuda.perturb_(w, u, v, late, rng, stream=7)
            w.mul_(2.0)  # after the update if both are on the side stream
        stream.synchronize()
        assert torch.equal(w, expected)


@pytest.mark.parametrize("rank", [24, 96])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_captured_graph_draws_anew_and_reads_coeff_at_each_replay(rank, rounding):
    w, u, v = case(640, 1024, rank, "bf16")
    expected = w.clone()
    coeff, rng = arguments(1e-2)
    plan = sk.perturb_plan([w], [u], [v], [7])
    with torch.no_grad():
        plan.perturb_(torch.zeros_like(coeff), rng)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.perturb_(coeff, rng, rounding)
            rng[1] += 1
        for draw, value in ((5, 1e-2), (6, -2e-2), (7, 3e-2)):
            coeff.fill_(value)
            graph.replay()
            cuda.perturb_(
                expected, u, v, coeff, make_rng(3, draw, "cuda"), stream=7, rounding=rounding
            )
            assert torch.equal(w, expected), draw


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used_and_the_current_one_kept():
    w, u, v = case(640, 1024, 96, "bf16")
    coeff, rng = arguments(1e-2)
    there = [t.to("cuda:1") for t in (w, u, v, coeff, rng)]
    cuda.perturb_(w, u, v, coeff, rng, stream=7)
    with torch.cuda.device(0):
        cuda.perturb_(*there, stream=7)
        assert torch.cuda.current_device() == 0
    assert torch.equal(there[0].cpu(), w.cpu())


def test_nothing_of_the_weights_size_is_allocated():
    """1 MiB and the bytes of U: scratch for the cores of high ranks or many queries."""
    for rank, queries in ((64, 1), (64, 40), (128, 1), (256, 2)):
        ws, us, vs = zip(*(case(2048, 2048, rank, "bf16") for _ in range(4)), strict=True)
        coeff = 1e-3 * torch.ones(queries, device="cuda")
        rng = make_rng(1, 0, "cuda")
        core = torch.zeros(rank, rank, device="cuda")
        with torch.no_grad():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            sk.perturb_many_(list(ws), list(us), list(vs), coeff, rng, streams=[0, 1, 2, 3])
            sk.fold_(ws[0], us[0], vs[0], core)
            torch.cuda.synchronize()
        allowed = (1 << 20) + sum(u.nbytes for u in us)
        assert torch.cuda.max_memory_allocated() - before <= allowed


@pytest.mark.parametrize("columns", [1 << 16, (1 << 16) - 1], ids=["aligned", "odd"])
def test_more_elements_than_an_int32_counts(columns):
    rows, rank = (1 << 15) + 33, 16
    if torch.cuda.mem_get_info()[0] < 2.2 * rows * columns * 2:
        pytest.skip("needs 10 GB of free GPU memory")
    # Near 1 the gaps of bf16 are 2^-8 and 2^-7, and what is added is smaller by far.
    w = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    u, v = basis(rows, rank, torch.bfloat16), basis(columns, rank, torch.bfloat16)
    coeff, rng = arguments(2.0**-10)
    cuda.perturb_(w, u, v, coeff, rng, stream=7, rounding="stochastic")
    noise = torch.zeros(rank, rank, device="cuda")
    cuda.normal_(noise, rng, 7)
    scale = 2.0**-10 * math.sqrt(rows * columns) / rank
    last = slice(rows - 40, rows)
    added = scale * (u[last].double() @ noise.double() @ v.double().T)
    word = words(rng, rounding_stream(7), 40 * columns, start=(rows - 40) * columns)
    error = 0.02 * added.norm() / math.sqrt(added.numel())
    low, high = (
        round_stochastic((1.0 + added + e).float(), word.view(added.shape), w.dtype)
        for e in (-error, error)
    )
    sure = low == high
    assert sure.double().mean() > 0.9
    assert torch.equal(w[last][sure], low[sure].to(w.dtype))


def test_an_error_names_the_op_and_the_shapes():
    w, u, v = case(8, 8, 2, "fp32")
    with pytest.raises(RuntimeError, match=r"fold_: .*, on w \(1, 64\), u \(8, 2\), v \(8, 2\)"):
        native.cuda.LowRankPlan(op="fold_", items=[cuda.args.low_rank(w, u, v, 0)], device=99)
