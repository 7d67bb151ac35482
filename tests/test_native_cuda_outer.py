"""CUDA noise_outer_ and lowrank_embedding, which use the tensor cores, against float64."""

from __future__ import annotations

import math

import pytest
import torch

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from op_cases import DTYPES, assert_close, factors  # noqa: E402
from test_native_cuda_noise import LONG_ROWS, chosen_rows  # noqa: E402

import subzero_kernels as sk  # noqa: E402
from subzero_kernels.backends import cpu, cuda, reference  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

pytestmark = pytest.mark.gpu

STREAM = 5 << 28 | 3


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)


def rng() -> torch.Tensor:
    return make_rng(-5, 2**32 - 2, "cuda")


def exact_outer(weight, a, rows, columns: int) -> torch.Tensor:
    """sum_k sum_i weight[k, i] z_k[rows[i]]^T a[i] in float64, of the CPU's normals."""
    total = torch.zeros(len(rows), columns, dtype=torch.float64, device="cuda")
    ones = torch.ones(1, len(rows))
    for k, weights in enumerate(weight):
        z = torch.zeros(1, len(rows), columns)
        query = torch.tensor([k])
        cpu.add_noise_(z, ones, query, rows.cpu(), rng().cpu(), stream=STREAM)
        total += weights.double()[:, None] * z[0].cuda().double()
    return total.T @ a.double()


def outer_case(columns: int, width: int, count: int, queries: int, dtype: torch.dtype):
    weight = torch.randn(queries, count) * (torch.rand(queries, count) < 0.7)
    weight[0, 0] = 1.0
    a = torch.randn(count, width).to(dtype)
    return weight.cuda(), a.cuda(), chosen_rows(count).cuda()


OUTER = [  # columns, width, count, queries
    (1, 1, 1, 1),
    (4, 1, 17, 2),
    (7, 3, 10, 2),
    (129, 1, 300, 32),
    (576, 64, 512, 4),
    (1151, 33, 65, 1),
    (1152, 16, 1000, 3),
    (5120, 64, 2048, 4),
    (5120, 128, 700, 2),
    (64, 100, 5000, 1),
    (2048, 200, 300, 2),
    (96, 1151, 65, 1),
]


@pytest.mark.parametrize(("columns", "width", "count", "queries"), OUTER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_outer(dtype, columns, width, count, queries):
    weight, a, rows = outer_case(columns, width, count, queries, dtype)
    added = exact_outer(weight, a, rows, columns)
    for beta in (0.0, 1.0, 0.9):
        before = torch.randn(columns, width, device="cuda")
        got = [torch.full_like(before, math.nan) if beta == 0 else before.clone() for _ in "ab"]
        for out in got:
            cuda.noise_outer_(out, weight, a, rows, rng(), stream=STREAM, beta=beta)
        exact = added + (beta * before.double() if beta else 0.0)
        assert_close(got[0], exact.cpu(), added.cpu())
        assert torch.equal(*got)


def test_noise_outer_rounds_a_large_out_once():
    """However many thread blocks add to it: the added term is within fp32's rounding of out."""
    weight, a, rows = outer_case(576, 64, 4096, 1, torch.float32)
    added = exact_outer(weight, a, rows, 576)
    before = 1e6 * torch.randn(576, 64, device="cuda")
    got = before.clone()
    cuda.noise_outer_(got, weight, a, rows, rng(), stream=STREAM, beta=0.9)
    assert_close(got, (added + 0.9 * before.double()).cpu(), added.cpu())


@pytest.mark.parametrize("noisy", ["every 32nd", "first 50", "one in each query", "none"])
@pytest.mark.parametrize("columns", [576, 1151])
def test_noise_outer_of_some_rows(noisy, columns):
    weight, a, rows = outer_case(columns, 24, 1600, 3, torch.bfloat16)
    kept = torch.zeros_like(weight)
    if noisy == "every 32nd":
        kept[:, ::32] = 1
    elif noisy == "first 50":
        kept[:, :50] = 1
    elif noisy == "one in each query":
        kept[[0, 1, 2], [5, 6, 900]] = 1
    weight = kept * torch.randn_like(weight)
    added = exact_outer(weight, a, rows, columns)
    got = torch.full((columns, 24), math.nan, device="cuda")
    cuda.noise_outer_(got, weight, a, rows, rng(), stream=STREAM)
    assert_close(got, added.cpu(), added.cpu())


def test_noise_outer_across_the_upper_half_of_block_numbers():
    weight, a = torch.ones(1, 4, device="cuda"), torch.eye(4, device="cuda")
    got = torch.empty(5120, 4, device="cuda")
    cuda.noise_outer_(got, weight, a, LONG_ROWS.cuda(), rng(), stream=STREAM)
    exact = exact_outer(weight, a, LONG_ROWS, 5120)
    assert_close(got, exact.cpu(), exact.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_outer_takes_strided_rows_and_writes_nothing_else(dtype):
    weight, wide, rows = outer_case(129, 80, 300, 2, dtype)
    for first, width in ((3, 16), (8, 16), (16, 64), (1, 7)):
        a = wide[:, first : first + width]
        buffer = torch.full((129, 90), math.nan, device="cuda")
        cuda.noise_outer_(buffer[:, 5 : 5 + width], weight, a, rows, rng(), stream=STREAM)
        exact = exact_outer(weight, a, rows, 129)
        assert_close(buffer[:, 5 : 5 + width], exact.cpu(), exact.cpu())
        assert buffer[:, :5].isnan().all() and buffer[:, 5 + width :].isnan().all()


def test_noise_outer_without_rows_scales_out():
    for width in (3, 200):
        weight, a, rows = outer_case(33, width, 1, 2, torch.float32)
        out = torch.randn(33, width, device="cuda")
        expected = 0.5 * out
        empty = weight[:, :0].contiguous(), a[:0], rows[:0]
        cuda.noise_outer_(out, *empty, rng(), stream=STREAM, beta=0.5)
        assert torch.equal(out, expected)
        cuda.noise_outer_(out, *empty, rng(), stream=STREAM)
        assert not out.any()


@pytest.mark.parametrize("width", [64, 200])
def test_noise_outer_s_scratch_is_no_larger_than_out(width):
    weight, a, rows = outer_case(5120, width, 4096, 1, torch.bfloat16)
    out = torch.zeros(5120, width, device="cuda")
    for _ in range(2):  # the first may make cuBLAS's workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cuda.noise_outer_(out, weight, a, rows, rng(), stream=STREAM, beta=1.0)
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
    noise_and_a = 2 * out.numel() * 4 if width > 128 else out.numel() * 4
    assert taken <= noise_and_a + (1 << 20)


def test_a_wide_noise_outer_in_blocks_is_the_same_again(monkeypatch):
    weight, a, rows = outer_case(33, 200, 100, 2, torch.float32)
    added = exact_outer(weight, a, rows, 33)
    monkeypatch.setattr(cuda, "_NOISE_ELEMENTS", 13 * 33)
    got = [torch.empty(33, 200, device="cuda") for _ in range(2)]
    for out in got:
        cuda.noise_outer_(out, weight, a, rows, rng(), stream=STREAM)
    assert_close(got[0], added.cpu(), added.cpu())
    assert torch.equal(*got)


def test_noise_outer_is_exact_whatever_precision_the_user_chose():
    for width in (64, 256):
        weight, a, rows = outer_case(256, width, 256, 1, torch.float32)
        results = []
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("highest", "medium"):
                torch.set_float32_matmul_precision(precision)
                out = torch.empty(256, width, device="cuda")
                cuda.noise_outer_(out, weight, a, rows, rng(), stream=3)
                results.append(out)
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.equal(*results)


def test_a_captured_noise_outer_takes_turns_anew():
    """Its counters are cleared in the graph, and its scratch belongs to it."""
    draw, (weight, a, rows) = rng(), outer_case(5120, 64, 4096, 1, torch.bfloat16)
    out = torch.zeros(5120, 64, device="cuda")
    cuda.noise_outer_(out.clone(), weight, a, rows, draw, stream=STREAM, beta=1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.noise_outer_(out, weight, a, rows, draw, stream=STREAM, beta=1.0)
        draw[1] += 1
    expected, other = torch.zeros_like(out), rng()
    for _ in range(3):
        graph.replay()
        cuda.noise_outer_(expected, weight, a, rows, other, stream=STREAM, beta=1.0)
        other[1] += 1
    assert torch.equal(out, expected) and out.any()


# ---- lowrank_embedding


EMBEDDING = [  # entries, columns, rank, groups, tokens of a group
    (1, 1, 1, 1, 1),
    (129, 24, 7, 3, 10),
    (50, 1151, 33, 2, 200),
    (1000, 5120, 64, 2, 300),
    (300, 2048, 24, 1, 129),
    (300, 136, 128, 1, 1000),
    (300, 130, 100, 5, 65),
    (300, 64, 64, 64, 3),
    (300, 200, 150, 2, 30),
]
KINDS = [*[(dtype, dtype) for dtype in DTYPES], (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("entries", "columns", "rank", "groups", "tokens"), EMBEDDING)
@pytest.mark.parametrize(("dtype", "bases"), KINDS)
def test_lowrank_embedding(dtype, bases, entries, columns, rank, groups, tokens):
    w = torch.randn(entries, columns).to(dtype).cuda()
    u, v = (f.cuda() for f in factors(entries, columns, rank, bases))
    core = torch.randn(groups, rank, rank, device="cuda")
    ids = torch.randint(0, entries, (groups, tokens), device="cuda")
    for given in (ids, ids.int()):
        got = cuda.lowrank_embedding(given, w, u, v, core)
        assert got.shape == (groups, tokens, columns) and got.dtype == dtype
        base, tail = w.double()[ids], u.double()[ids] @ core.double() @ v.double().T
        assert_close(got, (base + tail).cpu(), torch.stack((base, tail)).cpu())
        # The tail alone, where E is zero, is as near.
        got = cuda.lowrank_embedding(given, torch.zeros_like(w), u, v, core)
        assert_close(got, tail.cpu(), tail.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowrank_embedding_of_strided_tensors(dtype):
    wide = torch.randn(300, 200).to(dtype).cuda()
    u, v = (f.cuda() for f in factors(300, 72, 16, dtype))
    pad = torch.full((300, 40), math.nan, device="cuda").to(dtype)
    pad[:, 3:19] = u
    core, ids = torch.randn(1, 16, 16, device="cuda"), torch.randint(0, 300, (9, 7), device="cuda")
    for first in (8, 3):
        w = wide[:, first : first + 72]
        expected = cuda.lowrank_embedding(ids, w.contiguous(), u, v, core)
        got = cuda.lowrank_embedding(ids.T.contiguous().T, w, pad[:, 3:19], v, core)
        assert torch.equal(got, expected)


def test_an_id_out_of_range_gives_nan_and_leaves_the_others():
    w = torch.randn(10, 24, device="cuda")
    u, v = (f.cuda() for f in factors(10, 24, 5, torch.float32))
    core = torch.randn(1, 5, 5, device="cuda")
    ids = torch.tensor([3, 10, -1, 2**40, 4], device="cuda")
    got = cuda.lowrank_embedding(ids, w, u, v, core)
    assert got[1:4].isnan().all()
    assert torch.equal(got[[0, 4]], cuda.lowrank_embedding(ids[[0, 4]], w, u, v, core))


def test_lowrank_linear_and_embedding_make_nothing_of_the_size_of_w():
    w = torch.randn(50_000, 1024, dtype=torch.bfloat16, device="cuda")
    u, v = (f.cuda() for f in factors(50_000, 1024, 16, torch.bfloat16))
    core, x = torch.randn(2, 16, 16, device="cuda"), torch.randn(4, 1024, device="cuda").bfloat16()
    ids = torch.arange(4, device="cuda")
    for call in (
        lambda: sk.lowrank_linear(x, w, None, u, v, core),
        lambda: sk.lowrank_linear(x, w[:, :], None, u.float(), v.float(), core),
        lambda: sk.lowrank_embedding(ids, w, u, v, core),
    ):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < w.numel()  # half its bytes


def test_the_reference_agrees_on_what_is_exact():
    """The oracle above and the reference backend's float64 sum, which share no noise code."""
    weight, a, rows = outer_case(129, 8, 50, 3, torch.float32)
    total = torch.zeros(129, 8, dtype=torch.float64, device="cuda")
    reference.noise_outer_(total, weight, a, rows, rng(), stream=STREAM)
    exact = exact_outer(weight, a, rows, 129)
    assert (total - exact).norm() < 1e-6 * exact.norm()
