"""The CUDA kernels give the bits of the CPU module, which other tests hold to the contract."""

from __future__ import annotations

import pytest
import torch

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from subzero_kernels.backends import cpu, cuda  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    works, why = cuda.available()
    if not works:
        pytest.skip(why)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    width = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return torch.equal(got.cpu().contiguous().view(width), expected.contiguous().view(width))


def cpu_normals(shape: tuple[int, ...], dtype: torch.dtype, seed: int, draw: int, stream: int):
    out = torch.empty(shape, dtype=dtype)
    cpu.normal_(out, make_rng(seed, draw), stream)
    return out


def test_words():
    counter = torch.randint(0, 1 << 32, (100_003, 4))
    key = torch.randint(0, 1 << 32, (2,))
    expected = cpu.philox4x32(counter, key)
    assert torch.equal(cuda.philox4x32(counter.cuda(), key.cuda()).cpu(), expected)
    assert cuda.philox4x32(counter[:0].cuda(), key.cuda()).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (129, 1151), (1 << 22,), (3, 5, 7)], ids=str)
def test_normals(dtype, shape):
    out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    cuda.normal_(out, make_rng(-3, 2**32 - 1, "cuda"), 0xFFFFFFFF)
    assert same_bits(out, cpu_normals(shape, dtype, -3, 2**32 - 1, 0xFFFFFFFF))


def test_normals_fill_a_misaligned_or_row_strided_view_and_nothing_else():
    buffer = torch.zeros(33, 40, device="cuda")
    cuda.normal_(buffer[:, 3:20], make_rng(1, 0, "cuda"), 2)
    assert same_bits(buffer[:, 3:20], cpu_normals((33, 17), torch.float32, 1, 0, 2))
    assert not buffer[:, :3].any() and not buffer[:, 20:].any()
    flat = torch.zeros(103, device="cuda")
    cuda.normal_(flat[1:102], make_rng(1, 0, "cuda"), 2)
    assert same_bits(flat[1:102], cpu_normals((101,), torch.float32, 1, 0, 2))
    assert flat[0] == 0 and flat[102] == 0


def test_more_elements_than_an_int32_counts():
    count = (1 << 31) + 4
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("needs 6 GB of free GPU memory")
    out = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    cuda.normal_(out, make_rng(5, 0, "cuda"), 1)
    words = cpu.philox4x32(torch.tensor([[count // 4 - 1, 0, 1, 0]]), torch.tensor([5, 0]))
    assert words.shape == (1, 4) and out[-4:].isfinite().all()
    u = ((words[0, ::2] >> 8).double() * 2.0**-24 + 2.0**-25).float().double()
    t = (words[0, 1::2] >> 8).double() * 2.0**-24 * (2 * torch.pi)
    radius = (-2 * u.log()).sqrt()
    expected = torch.stack((radius * t.cos(), radius * t.sin()), dim=1).view(-1)
    assert torch.allclose(out[-4:].double().cpu(), expected, rtol=2**-8, atol=1e-6)


def test_the_tensors_stream_and_its_order_are_kept():
    stream = torch.cuda.Stream()
    out = torch.zeros(1 << 24, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        rng = make_rng(1, 0, "cpu").pin_memory().to("cuda", non_blocking=True)
        cuda.normal_(out, rng, 3)
        out.mul_(2.0)  # runs after the fill if both are on the side stream
    stream.synchronize()
    assert same_bits(out, 2 * cpu_normals((1 << 24,), torch.float32, 1, 0, 3))


def test_a_captured_graph_draws_anew_from_its_rng():
    rng, out = make_rng(9, 0, "cuda"), torch.zeros(1000, device="cuda")
    cuda.normal_(out, rng, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.normal_(out, rng, 1)
        rng[1] += 1
    for draw in (0, 1, 2):
        graph.replay()
        assert same_bits(out, cpu_normals((1000,), torch.float32, 9, draw, 1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used_and_the_current_one_kept():
    out = torch.zeros(1000, device="cuda:1")
    with torch.cuda.device(0):
        cuda.normal_(out, make_rng(9, 0, "cuda:1"), 1)
        assert torch.cuda.current_device() == 0
    assert same_bits(out, cpu_normals((1000,), torch.float32, 9, 0, 1))
