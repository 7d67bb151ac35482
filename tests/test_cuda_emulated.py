"""The CUDA perturb_ and fold_ without a GPU: their own source on an emulator (emulated_cuda.py).

What an H100 must give too (test_native_cuda_lowrank.py), on matrices of a few tiles.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cuda_cases import KINDS, close, oracle
from op_cases import factors

from subzero_kernels.rng import make_rng, round_stochastic, rounding_stream, words

if not sys.platform.startswith("linux") or shutil.which("g++") is None:
    pytest.skip("needs g++ on Linux", allow_module_level=True)

import emulated_cuda  # noqa: E402
from emulated_cuda import LARGE_BLOCK, SMALL_BLOCK, Emulated, Sources  # noqa: E402

kinds = pytest.mark.parametrize("kind", KINDS)
# (m', n', r): one row, one column, odd, ends of tiles and chunks, every class of ranks
CASES = [
    (1, 1, 1),
    (131, 1, 1),
    (7, 129, 7),
    (17, 1024, 8),
    (129, 1151, 16),
    (130, 264, 24),
    (96, 64, 33),
    (300, 264, 64),
    (128, 136, 100),
    (200, 136, 128),
    (260, 257, 200),
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled once by whichever worker comes first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    return emulated_cuda.build_once(folder / "emulated")


@pytest.fixture
def gpu(built: Path) -> Emulated:
    return Emulated(built)


def case(rows: int, columns: int, rank: int, kind: str, scale: float = 1.0):
    weight, bases = KINDS[kind]
    w = (scale * torch.randn(rows, columns)).to(weight)
    return w, *factors(rows, columns, rank, bases)


def arguments(*coeff: float, seed: int = 3, draw: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(coeff), make_rng(seed, draw)


# ---- values


def check_values(gpu: Emulated, shape: tuple[int, int, int], kind: str) -> None:
    # Of W the added term is a few ulp for 16 bits, a thousandth for fp32, and all of it.
    for scale in (1.0, 0.0):
        w, u, v = case(*shape, kind, scale)
        coeff, rng = arguments(1e-2, -3e-3)
        exact, added = oracle(w, u, v, coeff, rng, 7)
        gpu.perturb_many_([(w, u, v, 7)], coeff, rng)
        close(w, exact, added)


@kinds
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_perturb_meets_the_bound(gpu, kind, shape):
    check_values(gpu, shape, kind)


@kinds
@pytest.mark.parametrize("shape", [(129, 151, 16), (130, 264, 64), (140, 136, 130)], ids=str)
def test_fold_meets_the_bound(gpu, kind, shape):
    for decay in (1.0, 0.999, -0.3):
        w, u, v = case(*shape, kind)
        core = 1e-2 * torch.randn(shape[2], shape[2])
        added = u.double() @ core.double() @ v.double().T
        exact = decay * w.double() + added
        gpu.fold_((w, u, v, 7), core, make_rng(1), decay=decay)
        close(w, exact, added)


@kinds
@pytest.mark.parametrize("rank", [8, 64, 96])
def test_any_number_of_queries(gpu, kind, rank):
    """Few queries make their core in each thread block, many and high ranks in a launch before."""
    for queries in (2, 40):
        w, u, v = case(120, 200, rank, kind)
        coeff = 1e-2 * torch.randn(queries)
        coeff[queries // 2] = 0.0
        rng = make_rng(-9, 2**32 - 2)  # draws wrap
        exact, added = oracle(w, u, v, coeff, rng, 0x0FFFFFFF)
        gpu.perturb_many_([(w, u, v, 0x0FFFFFFF)], coeff, rng)
        close(w, exact, added)


@kinds
def test_tiny_and_huge_updates_keep_their_relative_precision(gpu, kind):
    """fp16 multiplies scaled numbers: none of them may vanish or overflow."""
    for coefficient in (2.0**-20, 1e3) if kind.startswith("fp16") else (1e-20, 1e20):
        w, u, v = case(80, 136, 64, kind, 0.0)
        coeff, rng = arguments(coefficient)
        exact, added = oracle(w, u, v, coeff, rng, 1)
        gpu.perturb_many_([(w, u, v, 1)], coeff, rng)
        close(w, exact, added)
        assert w.count_nonzero() > 0.9 * w.numel()


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16])
def test_the_two_bases_may_differ_in_dtype(gpu, weight):
    for bases in ((weight, torch.float32), (torch.float32, weight)):
        w = torch.randn(130, 264).to(weight)
        u, v = (t.to(dtype) for t, dtype in zip(factors(130, 264, 24, weight), bases, strict=True))
        coeff, rng = arguments(1e-2)
        exact, added = oracle(w, u, v, coeff, rng, 7)
        gpu.perturb_many_([(w, u, v, 7)], coeff, rng)
        close(w, exact, added)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "bf16-fp32", "fp16-fp32"])
@pytest.mark.parametrize("columns", [264, 263], ids=["aligned", "odd"])
def test_stochastic_rounding_decides_as_the_reference(gpu, kind, columns):
    """Wherever the error of the sum cannot change the decision, which is nearly everywhere."""
    w, u, v = case(150, columns, 24, kind)
    gap = 2.0**-8 if w.dtype == torch.bfloat16 else 2.0**-11
    coeff, rng = arguments(0.2 * gap, draw=11)
    exact, added = oracle(w, u, v, coeff, rng, 7)
    word = words(rng, rounding_stream(7), w.numel()).view(w.shape)
    error = 0.02 * added.norm() / math.sqrt(added.numel())

    def sure(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (round_stochastic((exact + e).float(), word, w.dtype) for e in (-error, error))
        assert (low == high).double().mean() > 0.95
        return low == high, low.to(w.dtype)

    where, expected = sure(exact)
    got = w.clone()
    gpu.perturb_many_([(got, u, v, 7)], coeff, rng, rounding="stochastic")
    assert torch.equal(got[where], expected[where])
    assert not torch.equal(got, exact.to(w.dtype))
    core = coeff[0] * torch.randn(24, 24)
    where, expected = sure(0.99 * w.double() + u.double() @ core.double() @ v.double().T)
    gpu.fold_((w, u, v, 7), core, rng, decay=0.99, rounding="stochastic")
    assert torch.equal(w[where], expected[where])


# ---- memory


def layouts(rows: int, columns: int, dtype: torch.dtype):
    """(name, buffer, view of it that holds rows x columns elements)."""

    def buffer(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    wide = buffer(rows + 2, columns + 16)
    yield "rows apart by an aligned stride", wide, wide[1:-1, 8 : columns + 8]
    odd = buffer(rows, columns + 5)
    yield "rows apart by an odd stride", odd, odd[:, 3 : columns + 3]
    flat = buffer(rows * columns + 9)
    yield "a misaligned run", flat, flat[1 : rows * columns + 1]
    cube = buffer(rows // 2, 2, columns)
    yield "three dimensions", cube, cube
    narrow = buffer(rows * 2, columns // 2 + 6)
    yield "rows of its own, apart", narrow, narrow[:, 2 : columns // 2 + 2]


@kinds
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_layout_gives_the_bits_of_a_contiguous_matrix_and_touches_nothing_else(
    gpu, kind, rounding
):
    rows, columns, rank = 130, 136, 24
    _, u, v = case(rows, columns, rank, kind)
    coeff, rng = arguments(1e-2)
    core = 1e-2 * torch.randn(rank, rank)

    def run(w: torch.Tensor) -> None:
        gpu.perturb_many_([(w, u, v, 7)], coeff, rng, rounding=rounding)
        gpu.fold_((w, u, v, 7), core, rng, decay=0.9, rounding=rounding)

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
def test_bases_of_any_stride_and_alignment(gpu, kind):
    w, u, v = case(130, 264, 24, kind)
    coeff, rng = arguments(1e-2)
    expected = w.clone()
    gpu.perturb_many_([(expected, u, v, 7)], coeff, rng)
    for gap, first in ((8, 0), (16, 8), (6, 2), (5, 3)):
        a, b = (
            torch.full((len(t), 24 + gap), math.nan, dtype=t.dtype)[:, first : first + 24].copy_(t)
            for t in (u, v)
        )
        got = w.clone()
        gpu.perturb_many_([(got, a, b, 7)], coeff, rng)
        assert torch.equal(got, expected), (gap, first)


# ---- launches


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_many_matrices_in_one_call_are_each_alone_bit_for_bit(gpu, rounding):
    """More of one kind than the shorter list holds, and others of every dtype and class."""
    shapes = [(5 + i, 64, 3) for i in range(33)]
    shapes += [(1, 33, 1), (64, 5, 2), (129, 160, 24), (17, 264, 8), (70, 96, 70), (40, 8, 8)]
    items = []
    for i, shape in enumerate(shapes):
        for kind in ["bf16"] if i < 33 else KINDS:
            items.append((*case(*shape[:2], min(shape), kind), len(items)))
    coeff, rng = arguments(1e-2, -3e-3)
    together = [(w.clone(), u, v, stream) for w, u, v, stream in items]
    gpu.perturb_many_(together, coeff, rng, rounding=rounding)
    for item, (got, *_) in zip(items, together, strict=True):
        gpu.perturb_many_([item], coeff, rng, rounding=rounding)
        assert torch.equal(got, item[0])


@kinds
@pytest.mark.parametrize("shape", [(300, 136, 8), (300, 200, 64), (210, 264, 200)], ids=str)
def test_the_bits_do_not_depend_on_the_chip(gpu, kind, shape):
    w, u, v = case(*shape, kind)
    coeff, rng = arguments(1e-2)
    expected = w.clone()
    gpu.perturb_many_([(expected, u, v, 7)], coeff, rng)
    for processors, block_bytes in ((1, LARGE_BLOCK), (132, LARGE_BLOCK), (28, SMALL_BLOCK)):
        got = w.clone()
        gpu.perturb_many_(
            [(got, u, v, 7)], coeff, rng, processors=processors, block_bytes=block_bytes
        )
        assert torch.equal(got, expected), (processors, block_bytes)


def test_too_little_shared_memory_is_an_error_that_leaves_the_weights(gpu):
    w, u, v = case(300, 264, 200, "bf16-fp32")
    before = w.clone()
    with pytest.raises(RuntimeError, match="too little shared memory"):
        gpu.perturb_many_([(w, u, v, 7)], *arguments(1e-2), block_bytes=48 << 10)
    assert torch.equal(w, before)


# ---- that the emulator sees what is wrong

MISTAKES = {
    "two numbers of a fragment exchanged": (
        "lowrank_kernel.cuh",
        "sum[p / 2 * T::kBlocks + i / 2][p % 2 * 2 + i % 2]",
        "sum[p / 2 * T::kBlocks + i / 2][p % 2 * 2 + 1 - i % 2]",
    ),
    "a wrong order of C's columns": (
        "lowrank_traits.cuh",
        "within % kRun / 4, half = within % 4 / 2;",
        "within % 4 / 2, half = within % kRun / 4;",
    ),
    "one group of copies too few waited for": (
        "lowrank_kernel.cuh",
        "wait_for_copies<T::kStages - 2>();",
        "wait_for_copies<T::kStages - 1>();",
    ),
    "no barrier after the copies": (
        "lowrank_kernel.cuh",
        "wait_for_copies<T::kStages - 2>();\n    __syncthreads();",
        "wait_for_copies<T::kStages - 2>();",
    ),
    "no barrier before W is written": (
        "lowrank_kernel.cuh",
        "__syncthreads();\n    if constexpr (kVector) w.store(stage);",
        "if constexpr (kVector) w.store(stage);",
    ),
    "no barrier after C is staged": (
        "lowrank_left.cuh",
        "panel * T::kPanel, shared);\n        __syncthreads();",
        "panel * T::kPanel, shared);",
    ),
    "a row too many written": (
        "lowrank_weight.cuh",
        "if (inside_ && my_row_ + i * apart_ < rows)",
        "if (inside_ && my_row_ + i * apart_ <= rows)",
    ),
    "a barrier that half the threads come to": (
        "lowrank_left.cuh",
        "if (turn > 0 || first > 0) __syncthreads();",
        "if (threadIdx.x < 128) __syncthreads();",
    ),
    "rows of shared memory without a gap": (
        "lowrank_left.cuh",
        "kCorePitch = kPanel + 8;",
        "kCorePitch = kPanel;",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_is_seen(built, tmp_path, mistake):
    sources = Sources(tmp_path / "broken")
    sources.replace(*MISTAKES[mistake])
    # Everything else as it was built.
    objects = [str(path) for path in built.parent.glob("*.o")]
    healthy = str(built.parent / Path(sources.kernels("bf16", 64)).name)
    objects[objects.index(healthy)] = str(sources.folder / Path(healthy).name)
    broken = Emulated(emulated_cuda.link(tmp_path, objects))
    # 131 rows of a wider buffer: tiles, one of 3 rows, and neighbours to be left alone.
    buffer = torch.ones(160, 280).to(torch.bfloat16)
    w = buffer[:131, 8:272].zero_()
    others = torch.ones_like(buffer, dtype=torch.bool)
    others[:131, 8:272] = False
    u, v = factors(131, 264, 40, torch.bfloat16)
    coeff, rng = arguments(1e-2)
    exact, added = oracle(w, u, v, coeff, rng, 7)

    def check(gpu: Emulated) -> None:
        w.zero_()
        gpu.perturb_many_([(w, u, v, 7)], coeff, rng, processors=1)
        close(w, exact, added)
        assert (buffer[others] == 1).all()

    check(Emulated(built))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken)
