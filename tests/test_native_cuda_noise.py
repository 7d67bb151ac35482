"""The CUDA kernels of ops that add noise to something give the bits of the CPU module."""

from __future__ import annotations

import math

import pytest
import torch

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from test_native_cuda import DTYPES, same_bits  # noqa: E402

from subzero_kernels.backends import cpu, cuda  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)


def rngs() -> tuple[torch.Tensor, torch.Tensor]:
    return make_rng(-5, 2**32 - 2), make_rng(-5, 2**32 - 2, "cuda")


def on_gpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


# ---- perturb_dense_


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_dense(dtype, rounding):
    """More tensors than one launch takes, some of them empty, short, or long."""
    sizes = [*range(12), 1023, 1024, 1025, 1151, 0, *range(100, 140), 1 << 20, 5, 100_003]
    ws = [torch.randn(n).to(dtype) for n in sizes] + [torch.randn(7, 129).to(dtype)]
    streams = [3 * i for i in range(len(ws))]
    coeff = torch.tensor([1e-2, 0.0, -3e-2])
    got = on_gpu(ws)
    host, device = rngs()
    cuda.perturb_dense_(got, coeff.cuda(), device, streams=streams, rounding=rounding)
    before = [w.clone() for w in ws]
    cpu.perturb_dense_(ws, coeff, host, streams=streams, rounding=rounding)
    assert all(same_bits(g, w) for g, w in zip(got, ws, strict=True))
    assert all(not torch.equal(w, b) for w, b in zip(ws, before, strict=True) if w.numel())


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_dense_of_dtypes_and_layouts_side_by_side(dtype):
    buffer = torch.full((33, 40), math.nan, dtype=dtype)
    buffer[:, 3:20] = torch.randn(33, 17)
    flat = torch.randn(103)
    got_buffer, got_flat = buffer.cuda(), flat.cuda()
    coeff, (host, device) = torch.tensor([0.5]), rngs()
    ws, got = [buffer[:, 3:20], flat[1:102]], [got_buffer[:, 3:20], got_flat[1:102]]
    cuda.perturb_dense_(got, coeff.cuda(), device, streams=[1, 2], rounding="stochastic")
    cpu.perturb_dense_(ws, coeff, host, streams=[1, 2], rounding="stochastic")
    assert same_bits(got_buffer, buffer) and same_bits(got_flat, flat)


# ---- core_noise_


@pytest.mark.parametrize(("groups", "queries"), [(1, 1), (1, 64), (65, 32), (64, 64)])
def test_core_noise(groups, queries):
    ranks = [1, 2, 3, 5, 16, 24, 33, 64, 128] * 5
    base = [torch.randn(r, r) for r in ranks]
    out = [torch.full((groups, r, r), math.nan) for r in ranks]
    coeff = torch.randn(groups, queries) * (torch.rand(groups, queries) < 0.5)
    kwargs = dict(streams=list(range(len(ranks))), mu=[0.3 * r for r in ranks])
    got, (host, device) = on_gpu(out), rngs()
    cuda.core_noise_(got, on_gpu(base), coeff.cuda(), device, **kwargs)
    cpu.core_noise_(out, base, coeff, host, **kwargs)
    assert all(same_bits(g, o) for g, o in zip(got, out, strict=True))


def test_core_noise_updates_its_base_in_place():
    base = [torch.randn(r, r) for r in (1, 7, 24, 64)]
    got, (host, device) = on_gpu(base), rngs()
    coeff, kwargs = torch.randn(1, 3), dict(streams=[1, 2, 3, 4], mu=[1.0, 2.0, 3.0, 4.0])
    cuda.core_noise_([b[None] for b in got], got, coeff.cuda(), device, **kwargs)
    cpu.core_noise_([b[None] for b in base], base, coeff, host, **kwargs)
    assert all(same_bits(g, b) for g, b in zip(got, base, strict=True))


# ---- add_noise_ and noise_outer_


def chosen_rows(count: int) -> torch.Tensor:
    """Rows of all sizes up to 2**44."""
    return (2.0 ** (44 * torch.rand(count, dtype=torch.float64))).long()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 64, 129, 576, 1151, 70_001])
def test_add_noise(dtype, columns):
    groups, count = (2, 3) if columns > 2000 else (5, 37)
    y = torch.randn(groups, count, columns).to(dtype)
    scale = torch.randn(groups, count) * (torch.rand(groups, count) < 0.7)
    y[scale == 0] = math.nan
    query, rows = torch.randint(0, 2**32, (groups,)), chosen_rows(count)
    got, (host, device) = y.cuda(), rngs()
    cuda.add_noise_(got, scale.cuda(), query.cuda(), rows.cuda(), device, stream=5 << 28 | 3)
    cpu.add_noise_(y, scale, query, rows, host, stream=5 << 28 | 3)
    assert same_bits(got, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise_writes_a_view_and_nothing_else(dtype):
    buffer = torch.full((37, 4, 80), math.nan, dtype=dtype)
    buffer[:, 1:, 3:76] = torch.randn(37, 3, 73)
    got = buffer.cuda()
    scale, query, rows = torch.randn(3, 37), torch.arange(3), chosen_rows(37)
    host, device = rngs()
    view, seen = (b[:, 1:, 3:76].transpose(0, 1) for b in (buffer, got))
    cuda.add_noise_(seen, scale.cuda(), query.cuda(), rows.cuda(), device, stream=3)
    cpu.add_noise_(view, scale, query, rows, host, stream=3)
    assert same_bits(got, buffer)


@pytest.mark.parametrize(
    ("columns", "width", "count", "queries"),
    [(1, 1, 1, 1), (7, 3, 10, 2), (129, 1, 300, 32), (576, 64, 512, 4), (1151, 1151, 65, 1)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_outer_within_rounding(dtype, columns, width, count, queries):
    """The product is torch's, so its order of summation is not ours."""
    weight = torch.randn(queries, count) * (torch.rand(queries, count) < 0.7)
    weight[0, 0] = 1.0
    a, rows, (host, device) = torch.randn(count, width).to(dtype), chosen_rows(count), rngs()
    for beta in (0.0, 1.0, 0.9):
        out = torch.randn(columns, width)
        got = torch.full_like(out, math.nan).cuda() if beta == 0 else out.cuda()
        arguments = weight.cuda(), a.cuda(), rows.cuda(), device
        cuda.noise_outer_(got, *arguments, stream=5 << 28, beta=beta)
        cpu.noise_outer_(out, weight, a, rows, host, stream=5 << 28, beta=beta)
        assert (got.cpu() - out).norm() < 2e-6 * out.norm()


def test_noise_outer_s_noise_bit_for_bit():
    """A unit matrix as A shows the weighted noise itself."""
    weight = torch.randn(3, 40) * (torch.rand(3, 40) < 0.7)
    rows, (host, device) = chosen_rows(40), rngs()
    out = torch.empty(1151, 40)
    got = out.cuda()
    unit = torch.eye(40)
    cuda.noise_outer_(got, weight.cuda(), unit.cuda(), rows.cuda(), device, stream=3)
    cpu.noise_outer_(out, weight, unit, rows, host, stream=3)
    assert torch.equal(got.cpu(), out)


def test_noise_outer_over_more_noise_than_is_made_at_a_time(monkeypatch):
    """Blocks of 13 rows, the last one shorter, give what one block gives, and do so again."""
    weight, a, rows = torch.randn(2, 100).cuda(), torch.randn(100, 20).cuda(), chosen_rows(100)
    _, device = rngs()
    out = [torch.randn(33, 20).cuda()] * 3
    out = [o.clone() for o in out]
    cuda.noise_outer_(out[0], weight, a, rows.cuda(), device, stream=3, beta=0.5)
    monkeypatch.setattr(cuda, "_NOISE_ELEMENTS", 13 * 33)
    for o in out[1:]:
        cuda.noise_outer_(o, weight, a, rows.cuda(), device, stream=3, beta=0.5)
    assert torch.equal(out[1], out[2])
    assert (out[0] - out[1]).norm() < 2e-6 * out[0].norm()


def test_noise_outer_is_exact_whatever_precision_the_user_chose():
    weight, a = torch.randn(1, 256).cuda(), torch.randn(256, 256).cuda()
    rows, (_, device) = torch.arange(256).cuda(), rngs()
    results = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            out = torch.empty(256, 256, device="cuda")
            cuda.noise_outer_(out, weight, a, rows, device, stream=3)
            results.append(out)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*results)


# ---- streams and graphs


def test_a_captured_graph_draws_anew_and_reads_its_coefficients_anew():
    """No host sync, and everything that changes from step to step is read on the device."""
    rng, coeff = make_rng(9, 0, "cuda"), torch.zeros(1, 2, device="cuda")
    rows, query = torch.arange(6, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    scale = torch.ones(1, 6, device="cuda")

    def step(w, base, y, outer, rng, coeff, rows, query, scale, backend):
        backend.perturb_dense_([w], coeff[0], rng, streams=[1])
        backend.core_noise_([base[None]], [base], coeff, rng, streams=[2], mu=[3.0])
        backend.add_noise_(y, scale, query, rows, rng, stream=3)
        backend.noise_outer_(outer, scale, y[0], rows, rng, stream=3)
        rng[1] += 2
        coeff += 0.5

    def state(device):
        shapes = (100,), (5, 5), (1, 6, 21), (7, 21)
        return [torch.zeros(shape, device=device) for shape in shapes]

    inputs = rng, coeff, rows, query, scale
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*state("cuda"), *[i.clone() for i in inputs], cuda)  # cuBLAS's workspace
    torch.cuda.synchronize()
    got, expected = state("cuda"), state("cpu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*got, *inputs, cuda)
    host = [i.cpu() for i in (make_rng(9), torch.zeros(1, 2), rows, query, scale)]
    for _ in range(3):
        graph.replay()
        step(*expected, *host, cpu)
    for g, e in zip(got[:3], expected[:3], strict=True):
        assert same_bits(g, e) and e.any()
    assert torch.allclose(got[3].cpu(), expected[3], atol=1e-4)


def test_the_tensors_stream_and_its_order_are_kept():
    stream = torch.cuda.Stream()
    size = 1 << 22
    w, core = torch.zeros(size, device="cuda"), torch.zeros(64, 64, device="cuda")
    y = torch.zeros(1, 1 << 10, 1 << 10, device="cuda")
    coeff, rng = torch.ones(1, 1, device="cuda"), make_rng(1, 0, "cuda")
    rows = torch.arange(1 << 10, device="cuda")
    scale = torch.ones(1, 1 << 10, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for tensor in (w, core, y):
            tensor.fill_(1.0)  # after the sleep: a kernel on another stream would be overwritten
        cuda.perturb_dense_([w], coeff[0], rng, streams=[1])
        cuda.core_noise_([core[None]], [core], coeff, rng, streams=[1], mu=[1.0])
        cuda.add_noise_(y, scale, rows[:1], rows, rng, stream=1)
        for tensor in (w, core, y):
            tensor.mul_(2.0)
    stream.synchronize()
    z = torch.empty(size)
    cpu.normal_(z, make_rng(1), 1)
    for tensor in (w, core, y):
        assert same_bits(tensor.view(-1), 2 * (1 + z[: tensor.numel()]))
