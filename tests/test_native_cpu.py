"""What only native code can get wrong: the same bits everywhere, memory, threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

from subzero_kernels.backends import _native_args as native_args  # noqa: E402
from subzero_kernels.backends import cpu  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

ISAS = native.build_info()["isas"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _default_isa() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    native.cpu.select_isa(ISAS[0])
    torch.set_num_threads(threads)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many sizes, among them subnormals, infinities and NaN."""
    values = torch.randn(shape) * torch.logspace(-9, 4, shape[-1])
    flat = values.view(-1)
    flat[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40])
    return values.to(dtype)


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple:
    return torch.randn(rows, rank).to(dtype), torch.randn(columns, rank).to(dtype)


def perturb(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    w = awkward((rows, columns), dtype)
    u, v = factors(rows, columns, rank, dtype)
    coeff = torch.tensor([1e-2, 0.0, -3e-3])
    cpu.perturb_(w, u, v, coeff, make_rng(7, 3), stream=5, rounding=rounding)
    return w


def fold(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    w = awkward((rows, columns), dtype)
    u, v = factors(rows, columns, rank, dtype)
    core = torch.randn(rank, rank)
    cpu.fold_(w, u, v, core, decay=0.99, rounding=rounding, rng=make_rng(7, 3), stream=5)
    return w


def dense(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    ws = [awkward((rows, columns), dtype), awkward((columns,), dtype)]
    coeff = torch.tensor([1e-2, 0.0, -3e-3])
    cpu.perturb_dense_(ws, coeff, make_rng(7, 3), streams=[1, 2], rounding=rounding)
    return torch.cat([w.view(-1) for w in ws])


def normal(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    out = torch.zeros(rows, columns + 3, dtype=dtype)
    cpu.normal_(out[:, :columns], make_rng(7, 3), 5)
    return out


def core_noise(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    base = torch.randn(rank, rank)
    out = torch.empty(20, rank, rank)
    coeff = torch.randn(20, 3) * (torch.rand(20, 3) < 0.7)
    cpu.core_noise_([out], [base], coeff, make_rng(7, 3), streams=[5], mu=[3.7])
    return out


def add_noise(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    y = awkward((2, rows, columns), dtype)
    scale, query = torch.randn(2, rows) * (torch.rand(2, rows) < 0.7), torch.tensor([0, 5])
    chosen = torch.randint(0, 1 << 40, (rows,))
    cpu.add_noise_(y, scale, query, chosen, make_rng(7, 3), stream=5)
    return y


def noise_outer(dtype: torch.dtype, rows: int, columns: int, rank: int, rounding: str):
    """Columns of noise, a narrow or wide A, and more of its rows than a chain."""
    out = awkward((columns, rank), torch.float32)
    a = torch.randn(2 * rows, rank + 3).to(dtype)[:, 3:]
    weight = torch.randn(2, 2 * rows) * (torch.rand(2, 2 * rows) < 0.7)
    chosen = torch.randint(0, 1 << 40, (2 * rows,))
    cpu.noise_outer_(out, weight, a, chosen, make_rng(7, 3), stream=5, beta=0.9)
    return out


CASES = [
    (op, dtype, rounding)
    for op in (perturb, fold, dense)
    for dtype in DTYPES
    for rounding in ("nearest", "stochastic")
] + [(op, dtype, "nearest") for op in (normal, add_noise, noise_outer) for dtype in DTYPES]
CASES.append((core_noise, torch.float32, "nearest"))


def name(case: object) -> str:
    return case.__name__ if callable(case) else str(case).removeprefix("torch.")


@pytest.mark.parametrize("op, dtype, rounding", CASES, ids=name)
@pytest.mark.parametrize("shape", [(7, 129, 3), (150, 90, 33), (30, 700, 17)], ids=str)
def test_every_instruction_set_gives_the_same_bits(op: Callable, dtype, rounding, shape):
    results = []
    for isa in ISAS:
        native.cpu.select_isa(isa)
        torch.manual_seed(0)
        results.append(op(dtype, *shape, rounding))
    assert native.build_info()["isa"] == ISAS[-1]
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op, dtype, rounding", CASES, ids=name)
def test_every_number_of_threads_gives_the_same_bits(op: Callable, dtype, rounding):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(op(dtype, 1100, 700, 40, rounding))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(90, 5000, 64), (5000, 90, 64), (700, 3000, 128)], ids=str)
def test_a_matrix_does_not_depend_on_its_company_nor_on_its_blocks(shape):
    """Wide, tall and large ranks take other blocks and sides; neighbours must not show through."""
    torch.manual_seed(0)
    rows, columns, rank = shape
    u, v = factors(rows, columns, rank, torch.float32)
    rng, coeff = make_rng(1, 2), torch.tensor([0.5])
    alone = torch.randn(rows, columns)
    together, others = alone.clone(), [torch.randn(300, 200) for _ in range(3)]
    bases = [factors(300, 200, 8, torch.float32) for _ in others]
    cpu.perturb_(alone, u, v, coeff, rng, stream=9)
    cpu.perturb_many_(
        [others[0], together, *others[1:]],
        [bases[0][0], u, bases[1][0], bases[2][0]],
        [bases[0][1], v, bases[1][1], bases[2][1]],
        coeff,
        rng,
        streams=[1, 9, 2, 3],
    )
    assert same_bits(alone, together)
    sliced = torch.zeros(rows, columns + 5)[:, :columns]
    sliced.copy_(alone)
    again = alone.clone()
    cpu.perturb_(sliced, u, v, coeff, rng, stream=4)
    cpu.perturb_(again, u, v, coeff, rng, stream=4)
    assert same_bits(sliced, again)


@pytest.mark.parametrize("rank", [1, 8, 32, 33, 64, 128])
def test_the_added_term_is_exact_to_one_and_a_half_1e_7(rank):
    torch.manual_seed(rank)
    for rows, columns in ((400, 300), (130, 900)):
        u, v = (torch.linalg.qr(torch.randn(n, rank))[0] for n in (rows, columns))
        u, v = u.contiguous(), v.contiguous()
        core = torch.randn(rank, rank)
        w = torch.zeros(rows, columns)
        cpu.fold_(w, u, v, core)
        exact = u.double() @ core.double() @ v.double().T
        assert (w.double() - exact).norm() < 1.5e-7 * exact.norm()


def test_noise_outer_over_more_noise_than_the_scratch_memory_holds():
    """The columns of noise come in parts then, which begin within a block of the generator."""
    torch.manual_seed(0)
    rows, columns, width = 5000, 1001, 70
    a, weight = torch.randn(rows, width), torch.randn(1, rows)
    z = torch.empty(rows, columns)
    cpu.normal_(z, make_rng(1, 2), 9)
    exact = (weight.T.double() * z.double()).T @ a.double()
    whole = torch.empty(columns, width)
    cpu.noise_outer_(whole, weight, a, torch.arange(rows), make_rng(1, 2), stream=9)
    assert (whole.double() - exact).norm() < 1e-6 * exact.norm()


def test_flushing_denormals_in_the_caller_changes_no_bit():
    torch.manual_seed(0)
    ws = [torch.full((50, 70), 3e-6, dtype=torch.float16) for _ in range(2)]  # subnormal in fp16
    u, v = factors(50, 70, 4, torch.float16)
    for w, flush in zip(ws, (False, True), strict=True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        try:
            cpu.perturb_(
                w, u, v, torch.tensor([1e-8]), make_rng(7), stream=5, rounding="stochastic"
            )
        finally:
            torch.set_flush_denormal(False)
    assert same_bits(*ws) and ws[0].float().unique().numel() > 1


def test_an_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match="isa: expected one of .*portable, got mmx"):
        native.cpu.select_isa("mmx")


# ---- memory

MEASURE = """
    import torch
    from subzero_kernels.backends import cpu
    from subzero_kernels.rng import make_rng

    def resident():
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmHWM"].split()[0]) * 1024

    def measure(run, *arguments):
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")                # VmHWM starts again at the current size
        before = resident()
        run(*arguments)
        print(resident() - before)
"""
PEAK = """
    rows, columns, rank, op, dtype = {arguments}
    w = torch.zeros(rows, columns, dtype=dtype)
    w.fill_(0.5)                              # every page is there before the measurement
    u = torch.full((rows, rank), 1e-3, dtype=dtype)
    v = torch.full((columns, rank), 1e-3, dtype=dtype)
    small = torch.zeros(64, 64)
    def run(w, u, v):
        rank = u.shape[1]
        if op == "perturb_":
            cpu.perturb_(w, u, v, torch.ones(2), make_rng(1), stream=1, rounding="stochastic")
        else:
            core = torch.ones(rank, rank)
            cpu.fold_(w, u, v, core, decay=0.9, rounding="stochastic", rng=make_rng(1))
    run(small, torch.ones(64, 4), torch.ones(64, 4))   # threads and code are there as well
    measure(run, w, u, v)
    assert w.view(-1)[0] != 0.5 and w.view(-1)[-1] != 0.5
"""
PEAK_OF_NOISE = """
    rows, columns, width = 1 << 13, 1 << 15, 8
    out, a, chosen = torch.zeros(columns, width), torch.ones(rows, width), torch.arange(rows)
    weight = torch.ones(1, rows)
    def run(count):
        part = weight[:, :count].contiguous(), a[:count], chosen[:count]
        cpu.noise_outer_(out, *part, make_rng(1), stream=1)
    run(64)
    measure(run, rows)
    assert out.any()
"""
GIB = 1 << 30


def peak(code: str) -> int:
    """Bytes that the call of ``measure`` in ``code`` takes at most, beyond what was there."""
    with open("/proc/meminfo") as info:
        free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))
    if free < 4 * GIB:
        pytest.skip(f"needs 4 GiB of free memory, {free / GIB:.1f} GiB are there")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@linux
@pytest.mark.parametrize(
    "op, rows, columns, rank, dtype",
    [
        ("perturb_", 1 << 14, 1 << 14, 64, "torch.float32"),
        ("perturb_", 1 << 22, 64, 64, "torch.float32"),
        ("perturb_", 64, 1 << 22, 64, "torch.float32"),
        ("fold_", 1 << 22, 64, 32, "torch.float32"),
        ("fold_", 1 << 14, 1 << 15, 16, "torch.bfloat16"),
    ],
    ids=str,
)
def test_a_gibibyte_is_written_with_less_than_64_mib(op, rows, columns, rank, dtype):
    assert rows * columns * (4 if dtype == "torch.float32" else 2) == GIB
    assert peak(PEAK.format(arguments=f"{rows}, {columns}, {rank}, {op!r}, {dtype}")) < 64 << 20


@linux
def test_a_gibibyte_of_noise_is_credited_with_less_than_64_mib():
    assert peak(PEAK_OF_NOISE) < 64 << 20


# ---- threads and processes


def _normals_on_two_threads(count: int) -> bytes:
    """Without torch's own parallel code, which does not survive a fork."""
    out, rng = torch.empty(count), make_rng(1)
    native.cpu.normal_(out=native_args.matrix(out), rng=rng.data_ptr(), stream=1, threads=2)
    return out.numpy().tobytes()


@linux
def test_a_forked_child_has_its_own_threads():
    expected = _normals_on_two_threads(1 << 20)  # starts the parent's threads
    child = os.fork()
    if child == 0:
        os._exit(0 if _normals_on_two_threads(1 << 20) == expected else 1)
    deadline = time.monotonic() + 60
    finished, status = 0, 0
    while not finished and time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not finished:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert finished and status == 0


def test_the_gil_is_released():
    out = torch.empty(1 << 26)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    other.start()
    start = time.perf_counter()
    torch.set_num_threads(1)
    cpu.normal_(out, make_rng(1), 1)
    end = time.perf_counter()
    done.set()
    other.join()
    # With the GIL held nothing could tick between the two ends of one call.
    assert sum(start < tick < end for tick in ticks) >= 3


def test_calls_from_many_threads_give_the_same_bits():
    torch.set_num_threads(2)
    expected = torch.empty(1 << 18)
    cpu.normal_(expected, make_rng(1), 1)
    outs = [torch.zeros(1 << 18) for _ in range(8)]
    threads = [threading.Thread(target=cpu.normal_, args=(out, make_rng(1), 1)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(out, expected) for out in outs)
