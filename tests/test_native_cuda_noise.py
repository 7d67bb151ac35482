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


# ---- add_noise_


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 576, 1151, 5120])
@pytest.mark.parametrize("noisy", ["every 32nd", "first 50", "last", "none"])
def test_add_noise_to_some_rows(noisy, columns, dtype):
    """Rows without a scale keep their bits, NaN and all, wherever the others lie."""
    count = 1600
    y = torch.full((2, count, columns), math.nan, dtype=dtype)
    chosen = {
        "every 32nd": slice(0, None, 32),
        "first 50": slice(0, 50),
        "last": slice(-1, None),
        "none": slice(0, 0),
    }[noisy]
    scale = torch.zeros(2, count)
    scale[:, chosen] = torch.randn(2, len(range(count)[chosen]))
    y[:, chosen] = torch.randn(2, len(range(count)[chosen]), columns).to(dtype)
    query, rows, (host, device) = torch.tensor([3, 0]), chosen_rows(count), rngs()
    got = y.cuda()
    cuda.add_noise_(got, scale.cuda(), query.cuda(), rows.cuda(), device, stream=5 << 28 | 3)
    cpu.add_noise_(y, scale, query, rows, host, stream=5 << 28 | 3)
    assert same_bits(got, y)


# The first of these rows ends with the last block whose number has 32 bits, the second begins
# there, ...
LONG_ROWS = torch.tensor([3355442, 3355443, 3355444, 2**40])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise_across_the_upper_half_of_block_numbers(dtype):
    y, scale = torch.randn(1, 4, 5120).to(dtype), torch.ones(1, 4)
    got, query, (host, device) = y.cuda(), torch.zeros(1, dtype=torch.int64), rngs()
    cuda.add_noise_(got, scale.cuda(), query.cuda(), LONG_ROWS.cuda(), device, stream=3)
    cpu.add_noise_(y, scale, query, LONG_ROWS, host, stream=3)
    assert same_bits(got, y)


# ---- many elements


def cpu_normals_from(row: int, columns: int, rng: torch.Tensor, stream: int) -> torch.Tensor:
    """The normals of elements row * columns and after."""
    z, one = torch.zeros(1, 1, columns), torch.ones(1, 1)
    cpu.add_noise_(z, one, torch.tensor([0]), torch.tensor([row]), rng, stream=stream)
    return z.view(-1)


def test_normals_of_nearly_every_word():
    """2**26 first words of a pair: 98 % of the 2**24 that make different radii."""
    count = 1 << 27
    got, host = torch.empty(count, device="cuda"), torch.empty(count)
    cuda.normal_(got, make_rng(3, 0, "cuda"), 1)
    cpu.normal_(host, make_rng(3), 1)
    assert same_bits(got, host)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_dense_of_a_long_tensor_beside_short_ones(dtype, rounding):
    """Long enough that thread blocks take several tiles one after another."""
    sizes = [5, (1 << 25) + 4096 + 3, 8192]
    ws = [torch.randn(n).to(dtype) for n in sizes]
    got, (host, device) = on_gpu(ws), rngs()
    coeff = torch.tensor([0.0, 2e-2])
    cuda.perturb_dense_(got, coeff.cuda(), device, streams=[1, 2, 3], rounding=rounding)
    cpu.perturb_dense_(ws, coeff, host, streams=[1, 2, 3], rounding=rounding)
    assert all(same_bits(g, w) for g, w in zip(got, ws, strict=True))


def test_more_elements_than_an_int32_counts():
    columns, rows = 5120, (1 << 31) // 5120 + 7
    if torch.cuda.mem_get_info()[0] < 5 * columns * rows:
        pytest.skip("needs 11 GB of free GPU memory")
    w = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    host, device = rngs()
    cuda.perturb_dense_([w], torch.ones(1, device="cuda"), device, streams=[7])
    for row in (0, 123_456, rows - 1):
        expected = cpu_normals_from(row, columns, host, 7).bfloat16()
        assert same_bits(w[row], expected)
    scale = torch.zeros(1, rows, device="cuda")
    scale[0, -1] = 1.0
    query = torch.zeros(1, dtype=torch.int64, device="cuda")
    before = w[-2:].clone()
    cuda.add_noise_(w[None], scale, query, torch.arange(rows, device="cuda"), device, stream=9)
    assert torch.equal(w[-2], before[0])
    z = cpu_normals_from(rows - 1, columns, host, 9)
    assert same_bits(w[-1], (before[1].cpu().float() + z).bfloat16())


# ---- memory and errors


def test_nothing_is_allocated():
    w, core = torch.zeros(1000, 1001, device="cuda"), torch.zeros(64, 64, device="cuda")
    y, rng = torch.zeros(1, 100, 576, device="cuda"), make_rng(1, 0, "cuda")
    rows, scale = torch.arange(100, device="cuda"), torch.ones(1, 100, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cuda.normal_(w, rng, 1)
    for view in (w, w[:, 1:]):
        cuda.perturb_dense_([view], scale[0, :2], rng, streams=[1], rounding="stochastic")
    cuda.core_noise_([core[None]], [core], scale[:, :2], rng, streams=[1], mu=[1.0])
    cuda.add_noise_(y, scale, rows[:1], rows, rng, stream=1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


def test_an_error_of_the_driver_names_the_op_and_the_shapes():
    nowhere = native.cuda.Launch(device=99, stream=0)
    out = native.Matrix(data=0, rows=3, columns=5, stride=5, dtype=native.Dtype.float32)
    with pytest.raises(RuntimeError, match=r"normal_: .*invalid device.*\(3, 5\)"):
        native.cuda.normal_(out=out, rng=0, stream=0, launch=nowhere)


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
        step(*state("cuda"), *[i.clone() for i in inputs], cuda)  # loads the kernels
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
