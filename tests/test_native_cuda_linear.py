"""lowrank_linear's kernels for Hopper, each choice of how to cut, against float64."""

from __future__ import annotations

import pytest
import torch

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from op_cases import assert_close, linear_case, on  # noqa: E402

from subzero_kernels.backends import _gemms, cuda  # noqa: E402
from subzero_kernels.backends import _native_args as args  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
CHOICES = range(8)  # four kinds of tiles, each with h from before and made inside


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)
    if not cuda._has_linear_kernel(0):
        pytest.skip("the kernels are for Hopper and were not built or this is another GPU")


def run(x, w, bias, u, v, core, choice: int = -1) -> torch.Tensor:
    """The native call alone, whatever the backend would choose."""
    call = args.require().cuda
    size = call.lowrank_linear_scratch_bytes(rows=x.shape[0], rank=u.shape[1], groups=core.shape[0])
    scratch = torch.full((size,), 255, dtype=torch.uint8, device="cuda")  # NaN of 16 bits
    y = torch.full((x.shape[0], w.shape[0]), float("nan"), dtype=x.dtype, device="cuda")
    call.lowrank_linear(
        args=args.lowrank_linear(x, w, bias, u, v, core, scratch, y),
        launch=cuda._launch(w),
        choice=choice,
    )
    return y


def case(rows, m, n, rank, groups, dtype, bias="none"):
    torch.manual_seed(0)
    w, u, v, core = linear_case(m, n, rank, groups, dtype)
    x = torch.randn(rows, n).to(dtype)
    shape = (groups, m) if "group" in bias else (m,)
    b = None if bias == "none" else torch.randn(shape) * 3
    if b is not None:
        b = (b if "fp32" in bias else b.to(dtype)).cuda()
    x, w, u, v, core = on("cuda", x, w, u, v, core)
    return x, w, b, u, v, core


def assert_exact(got, x, w, bias, u, v, core):
    x, w, u, v, core = (t.double() for t in (x, w, u, v, core))
    base = x @ w.T
    tail = ((x @ v).view(core.shape[0], -1, v.shape[1]) @ core.mT).view(len(x), -1) @ u.T
    exact = base + tail
    if bias is not None:
        grouped = exact.view(bias.numel() // bias.shape[-1], -1, bias.shape[-1])
        exact = (grouped + bias.double().view(grouped.shape[0], 1, -1)).view_as(exact)
    assert_close(got, exact.cpu(), torch.stack((base, tail)).cpu())


SHAPES = [  # rows, m, n, rank, groups
    (2, 8, 8, 8, 2),
    (1, 72, 64, 16, 1),
    (130, 72, 64, 8, 2),
    (96, 136, 200, 16, 3),
    (231, 640, 512, 64, 33),
    (257, 1000, 1000, 128, 1),
    (832, 640, 1024, 24, 2),
    (1000, 168, 72, 40, 5),
    (700, 264, 392, 256, 7),
    (2048, 512, 320, 72, 2),
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "m", "n", "rank", "groups"), SHAPES)
def test_values(rows, m, n, rank, groups, dtype, choice):
    data = case(rows, m, n, rank, groups, dtype, "fp32 per group")
    assert_exact(run(*data, choice=choice), *data)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "own", "fp32", "own per group"])
def test_bias(bias, dtype, choice):
    data = case(832, 200, 136, 16, 2, dtype, bias)
    assert_exact(run(*data, choice=choice), *data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_one_after_another(dtype):
    """More tiles than multiprocessors: a block reuses its ring, its sums and its bias."""
    data = case(5000, 3000, 200, 64, 4, dtype, "fp32 per group")
    for choice in CHOICES:
        assert_exact(run(*data, choice=choice), *data)


def test_two_runs_and_all_choices_agree():
    """Tiles change where a sum is made, not its order along k; h is made in parts or at once."""
    data = case(1024, 2048, 1536, 64, 2, torch.bfloat16, "own")
    for kind in (CHOICES[:4], CHOICES[4:]):
        first = run(*data, choice=kind[0])
        for choice in (*kind, *kind):
            assert torch.equal(run(*data, choice=choice), first)


def test_the_core_is_not_rounded_to_16_bits():
    """Two cores that bf16 cannot tell apart: a two-sided step lives on their difference."""
    x, w, _, u, v, core = case(512, 64, 256, 32, 2, torch.bfloat16)
    core[0] = 100
    core[1] = core[0] + 0.2
    assert torch.equal(core[0].bfloat16(), core[1].bfloat16())
    x = torch.cat([x[:256], x[:256]])
    w.zero_()
    tail = run(x, w, None, u, v, core).double().view(2, 256, 64)
    exact = ((x.double() @ v.double()).view(2, 256, -1) @ core.double().mT) @ u.double().T
    difference = (exact[1] - exact[0]).norm()
    assert ((tail - exact).norm() / exact.norm()) < 4e-3
    # h and y are rounded to bf16: of 512 numbers the errors average out.
    direction = (exact[1] - exact[0]) / difference
    assert abs(((tail[1] - tail[0]) * direction).sum() / difference - 1) < 0.2


def test_views_of_x_and_w():
    x, w, bias, u, v, core = case(300, 104, 96, 16, 1, torch.bfloat16, "own")
    wide_x, wide_w = (
        torch.randn(300, 160).cuda().bfloat16(),
        torch.randn(104, 128).cuda().bfloat16(),
    )
    x, w = wide_x[:, 32:128], wide_w[:, 8:104]
    assert_exact(run(x, w, bias, u, v, core), x, w, bias, u, v, core)
    two, bias = core.repeat(2, 1, 1), torch.randn(2, 300).cuda()[:, 7:111]
    assert_exact(run(x, w, bias, u, v, two), x, w, bias, u, v, two)


def test_the_backend_takes_them_or_the_composition():
    x, w, bias, u, v, core = case(512, 256, 128, 16, 2, torch.bfloat16, "own")
    assert torch.equal(cuda.lowrank_linear(x, w, bias, u, v, core), run(x, w, bias, u, v, core))
    odd = case(512, 250, 124, 12, 2, torch.bfloat16, "own")  # no tiles of 16 bytes
    assert torch.equal(cuda.lowrank_linear(*odd), _gemms.lowrank_linear(*odd))
    few = case(8, 256, 128, 16, 2, torch.bfloat16, "own")
    assert torch.equal(cuda.lowrank_linear(*few), _gemms.lowrank_linear(*few))


def test_a_captured_call_follows_its_core():
    data = case(1024, 256, 512, 64, 2, torch.bfloat16, "own")
    core = data[-1]
    cuda.lowrank_linear(*data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.lowrank_linear(*data)
    core.normal_()
    graph.replay()
    assert torch.equal(y, run(*data))


def test_calls_in_a_row_do_not_read_each_others_rows():
    """Kernels start before those before them end: x of one call is y of the call before."""
    torch.manual_seed(0)
    layers = [case(1024, 512, 512, 32, 2, torch.bfloat16) for _ in range(6)]
    x = layers[0][0]
    for _, w, _, u, v, core in layers:
        x = cuda.lowrank_linear(x, w, None, u, v, core)
    again = layers[0][0]
    for _, w, _, u, v, core in layers:
        again = cuda.lowrank_linear(again, w, None, u, v, core)
        torch.cuda.synchronize()
    assert torch.equal(x, again)
