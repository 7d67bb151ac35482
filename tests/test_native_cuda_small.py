"""Every CUDA kernel on a few small tensors: what `make sanitize` runs under compute-sanitizer.

Shapes end inside tiles, rows and blocks of the generator, where an access out of bounds would be;
each tensor is a memory block of its own, as PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes it, so that the
sanitizer knows its ends. Expectations are computed on the CPU: the sanitizer slows a GPU down.
"""

from __future__ import annotations

import pytest
import torch

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from op_cases import DTYPES, assert_close, factors  # noqa: E402

from subzero_kernels.backends import cpu, cuda  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

SEED, DRAW = -5, 2**32 - 2
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {  # W, bases
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "bf16 on fp32": (BF16, FP32),
    "fp16 on fp32": (FP16, FP32),
}


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)


def rngs() -> tuple[torch.Tensor, torch.Tensor]:
    return make_rng(SEED, DRAW), make_rng(SEED, DRAW, "cuda")


def on_gpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors]


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    width = torch.int32 if expected.dtype == FP32 else torch.int16
    return torch.equal(got.cpu().contiguous().view(width), expected.contiguous().view(width))


# ---- noise


def test_philox4x32():
    counter, key = torch.randint(0, 1 << 32, (301, 4)), torch.tensor([3, 2**32 - 1])
    got = cuda.philox4x32(counter.cuda(), key.cuda())
    assert torch.equal(got.cpu(), cpu.philox4x32(counter, key))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (4099,), (8192,), (33, 17), (5, 64)], ids=str)
def test_normal_and_perturb_dense(dtype, shape):
    """One kernel in two modes; contiguous, then rows of a wider buffer."""
    host, device = rngs()
    buffer = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)
    coeff = torch.tensor([0.3, -0.2])
    for contiguous in (True, False):
        for op in ("normal_", "nearest", "stochastic"):
            outer, outer_got = buffer.clone(), buffer.cuda()
            view, got = (b[..., 2:-1] for b in (outer, outer_got))
            if contiguous:
                view, got = view.contiguous(), got.contiguous()
            if op == "normal_":
                cpu.normal_(view, host, 7)
                cuda.normal_(got, device, 7)
            else:
                options = dict(streams=[7], rounding=op)
                cpu.perturb_dense_([view], coeff, host, **options)
                cuda.perturb_dense_([got], coeff.cuda(), device, **options)
            assert same(got, view) and same(outer_got, outer)


def test_perturb_dense_of_more_tensors_than_one_launch_takes():
    host, device = rngs()
    ws = [torch.randn(1 + i % 37).to(DTYPES[i % 3]) for i in range(900)]
    got, coeff, streams = on_gpu(ws), torch.tensor([0.3]), list(range(900))
    cpu.perturb_dense_(ws, coeff, host, streams=streams)
    cuda.perturb_dense_(got, coeff.cuda(), device, streams=streams)
    assert all(same(g, w) for g, w in zip(got, ws, strict=True))


@pytest.mark.parametrize("groups", [1, 3])
def test_core_noise(groups):
    host, device = rngs()
    base = [torch.randn(r, r) for r in (1, 3, 24, 65)] * 40  # with and without a longer batch
    coeff = torch.randn(groups, 2)
    for some in (base[:4], base):
        out = [torch.empty(groups, *b.shape) for b in some]
        got, options = on_gpu(out), dict(streams=list(range(len(some))), mu=[2.0] * len(some))
        cpu.core_noise_(out, some, coeff, host, **options)
        cuda.core_noise_(got, on_gpu(some), coeff.cuda(), device, **options)
        assert all(same(g, o) for g, o in zip(got, out, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 129, 1152])
def test_add_noise(dtype, columns):
    host, device = rngs()
    y, scale = torch.randn(3, 19, columns).to(dtype), torch.randn(3, 19)
    scale[:, ::3] = 0.0
    query, rows = torch.tensor([0, 5, 1]), torch.arange(19) * (2**40 + 3)
    got = y.cuda()
    cpu.add_noise_(y, scale, query, rows, host, stream=3)
    cuda.add_noise_(got, scale.cuda(), query.cuda(), rows.cuda(), device, stream=3)
    assert same(got, y)


# ---- products of noise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 16, 17, 32, 64, 100, 128, 150])
@pytest.mark.parametrize(("columns", "count"), [(37, 5), (160, 700)])
def test_noise_outer(dtype, width, columns, count):
    """Every width of the kernel and the sum for a GEMM; one thread block, and several in turn."""
    host, device = rngs()
    weight, a = torch.randn(2, count), torch.randn(count, width).to(dtype)
    weight[:, ::4] = 0.0
    rows = torch.arange(count) * 3
    z = torch.zeros(2, count, columns)
    cpu.add_noise_(z, torch.ones(2, count), torch.arange(2), rows, host, stream=3)
    added = torch.einsum("kn,knc,nr->cr", weight.double(), z.double(), a.double())
    before = torch.randn(columns, width)
    for beta in (0.0, 0.9):
        out = before.cuda()
        tensors = on_gpu([weight, a, rows])
        cuda.noise_outer_(out, *tensors, device, stream=3, beta=beta)
        assert_close(out, beta * before.double() + added, added)


# ---- low-rank updates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [5, 16, 24, 64, 100, 200])
@pytest.mark.parametrize("columns", [136, 131], ids=["vectors", "elements"])
def test_perturb_and_fold(kind, rank, columns):
    """All dtypes, classes of ranks, accesses and roundings, and few and many queries."""
    dtype, bases = KINDS[kind]
    host, device = rngs()
    rows = max(rank, 75)
    columns += max(0, rank - 128)  # no fewer than the rank, and as aligned
    w = torch.randn(rows, columns).to(dtype)
    u, v = factors(rows, columns, rank, bases)
    core = 1e-2 * torch.randn(rank, rank)
    u_, v_, core_ = on_gpu([u, v, core])
    for queries in (1, 40):
        coeff = 1e-2 * torch.randn(queries) / queries**0.5
        exact = w.double()
        cpu_w = torch.zeros(rows, columns)
        cpu.perturb_(cpu_w, u.float(), v.float(), coeff, host, stream=7)
        added = cpu_w.double()
        for rounding in ("nearest", "stochastic"):
            got = w.cuda()
            cuda.perturb_(got, u_, v_, coeff.cuda(), device, stream=7, rounding=rounding)
            close(got, exact + added, added, rounding)
    added = u.double() @ core.double() @ v.double().T
    for rounding in ("nearest", "stochastic"):
        got = w.cuda()
        cuda.fold_(got, u_, v_, core_, decay=0.9, rounding=rounding, rng=device, stream=7)
        close(got, 0.9 * exact + added, added, rounding)


def close(got: torch.Tensor, exact: torch.Tensor, added: torch.Tensor, rounding: str) -> None:
    """The contract's bound; a stochastic rounding is off by twice as much at most."""
    if rounding == "nearest" or got.dtype == FP32:
        assert_close(got, exact, added)
        return
    gap = torch.finfo(got.dtype).eps * exact.abs().clamp(min=torch.finfo(got.dtype).tiny)
    error = (got.cpu().double() - exact).abs()
    assert (error <= gap + 2e-2 * added.square().mean().sqrt()).all()


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("count", [5, 320])
def test_perturb_many(count, queries):
    """A list in one launch of a kind, and one that takes several; every matrix a little other."""
    host, device = rngs()
    ws, us, vs = [], [], []
    for i in range(count):
        dtype, bases = list(KINDS.values())[i % len(KINDS) if i < 10 else 1]
        rows, columns, rank = 1 + i % 67, 8 + i % 90, 1 + min(i % 67, i % 8)
        u, v = factors(rows, columns, rank, bases)
        ws.append(torch.randn(rows, columns).to(dtype)), us.append(u), vs.append(v)
    got, coeff, streams = on_gpu(ws), 1e-2 * torch.randn(queries), list(range(count))
    cuda.perturb_many_(got, on_gpu(us), on_gpu(vs), coeff.cuda(), device, streams=streams)
    for w, u, v, g, stream in zip(ws, us, vs, got, streams, strict=True):
        added = torch.zeros(w.shape)
        cpu.perturb_(added, u.float(), v.float(), coeff, host, stream=stream)
        assert_close(g, w.double() + added.double(), added.double())


# ---- side path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [7, 32, 64, 100])
@pytest.mark.parametrize("columns", [136, 131], ids=["vectors", "elements"])
def test_lowrank_embedding(kind, rank, columns):
    dtype, bases = KINDS[kind]
    w = torch.randn(107, columns).to(dtype)
    u, v = factors(107, columns, rank, bases)
    core, ids = torch.randn(2, rank, rank), torch.randint(0, 107, (2, 131))
    ids[0, 3] = 106
    got = cuda.lowrank_embedding(*on_gpu([ids, w, u, v, core]))
    base, tail = w.double()[ids], u.double()[ids] @ core.double() @ v.double().T
    assert_close(got, base + tail, torch.stack((base, tail)))
