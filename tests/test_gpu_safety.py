"""Every in-place op of both GPU backends: devices, streams, graphs, processes, memory, errors.

That the CUDA kernels give the CPU's bits in the same situations is in test_native_cuda*.py.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_cases
import pytest
import torch
from gpu_cases import DRAW, OPS, QUERIES, Data, InPlace, same_bits
from torch import Tensor

import subzero_kernels
from subzero_kernels import backends

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join((str(TESTS), str(Path(subzero_kernels.__file__).parent.parent)))

each_op = pytest.mark.parametrize("op", OPS)
# Two paths of most ops: a core that the update makes itself and a noise_outer_ in one kernel; a
# core made in a launch before, with scratch, and a noise_outer_ through cuBLAS.
each_path = pytest.mark.parametrize("rank", [24, 200])


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    module, why = backends.load(request.param)
    if module is None:
        pytest.skip(why)
    monkeypatch.setenv(backends.VARIABLE, request.param)
    return request.param


def case_of(op: str, rank: int, device: str = "cuda:0") -> InPlace:
    return OPS[op](Data(device, torch.bfloat16, 264, 520, rank))


# ---- devices and streams


def start_late(case: InPlace, stream: torch.cuda.Stream, written: list[Tensor], rng: Tensor):
    """The op on tensors that get their values late and are doubled after it, all on ``stream``.

    Kernels on another stream would run before the values are there, or after the doubling.
    """
    current = torch.cuda.current_device()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        for to, start in zip(written, case.start, strict=True):
            to.copy_(start)
        with torch.cuda.device(current):  # the stream made its own device the current one
            case.run(written, rng)
            assert torch.cuda.current_device() == current
        for tensor in written:
            tensor.mul_(2.0)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [2.0 * tensor for tensor in tensors]


@each_path
@each_op
def test_a_side_stream_orders_an_op_which_needs_no_other_stream(op, rank):
    """The op is done while the default stream is still busy with what came before."""
    case, side = case_of(op, rank), torch.cuda.Stream()
    expected, written, rng = doubled(case.result()), case.fresh(), case.rng()
    with torch.cuda.stream(side):
        case.result()  # kernels and memory are there: nothing waits for the driver
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start_late(case, side, written, rng)
    side.synchronize()
    assert not torch.cuda.default_stream().query()
    torch.cuda.synchronize()
    assert same_bits(written, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_path
@each_op
def test_the_tensors_device_and_its_stream_are_used_and_the_current_device_kept(op, rank):
    last = torch.cuda.device_count() - 1
    expected = doubled(case_of(op, rank).result())
    case, stream = case_of(op, rank, f"cuda:{last}"), torch.cuda.Stream(device=last)
    written, rng = case.fresh(), case.rng()
    torch.cuda.synchronize(last)
    start_late(case, stream, written, rng)
    stream.synchronize()
    assert same_bits(written, expected)


# ---- graphs


@pytest.mark.parametrize("tensors", ["warm", "new"])
@each_path
@each_op
def test_a_replay_equals_the_op_at_the_advanced_draw(op, rank, tensors):
    """Captured with the tensors of a call before, or with others: their addresses are new then."""
    case = case_of(op, rank)
    written, expected, rng = case.fresh(), case.fresh(), case.rng()
    case.run(written if tensors == "warm" else case.fresh(), rng)
    for to, start in zip(written, case.start, strict=True):
        to.copy_(start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(written, rng)
        rng[1] += QUERIES
    assert same_bits(written, case.start)  # a capture runs nothing
    for step in range(3):
        # Memory that the capture gave back but still needs would be overwritten.
        junk = [torch.full((1 << size,), math.nan, device="cuda") for size in range(8, 22)]
        graph.replay()
        case.run(expected, case.rng(DRAW + QUERIES * step))
        assert same_bits(written, expected), step
        del junk
    assert int(rng[1]) == DRAW + 3 * QUERIES


# ---- processes


def test_two_processes_on_one_gpu_get_the_same_bits():
    """Of all ops in all dtypes, while the other process is at work too."""
    command = [sys.executable, str(TESTS / "gpu_cases.py"), "cuda:0"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as other:
        first = other.stdout.readline()
        assert first, "the other process ended"
        here = {gpu_cases.digest("cuda:0") for _ in range(5)}
        assert other.poll() is None
        rest, _ = other.communicate("stop\n", timeout=300)
    assert rest.split()
    assert {first.strip(), *rest.split()} == here


# ---- memory


@each_path
@each_op
def test_an_op_allocates_at_most_a_mib_and_the_bytes_of_u(op, rank):
    data = Data("cuda:0", torch.bfloat16, 1024, 8192, rank)
    case = OPS[op](data)
    allowed = (1 << 20) + case.basis_bytes
    if op not in ("core_noise_", "noise_outer_"):
        assert max(t.nbytes for t in case.start) > 2 * allowed  # a copy of W would show
    case.result()  # kernels are loaded, and cuBLAS has its workspace
    written, rng = case.fresh(), case.rng()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run(written, rng)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= allowed


# ---- errors

# A capture that something else has spoiled refuses every launch, which harms nothing but itself.
SPOILED_CAPTURE = """
import os
import torch
from gpu_cases import OPS, Data

cases = {name: make(Data("cuda:0", torch.bfloat16, 264, 520, 24)) for name, make in OPS.items()}
written = {name: case.fresh() for name, case in cases.items()}
rng = cases["normal_"].rng()
for name, case in cases.items():
    case.run(written[name], rng)
torch.cuda.synchronize()
side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
with torch.cuda.stream(side):
    graph.capture_begin()
    try:
        side.synchronize()
    except RuntimeError:
        pass
    for name, case in cases.items():
        try:
            case.run(written[name], rng)
            print(name, "no error", sep="|", flush=True)
        except RuntimeError as error:
            print(name, " ".join(str(error).split()), sep="|", flush=True)
os._exit(0)  # torch would wait for the capture's end
"""


def test_an_error_of_the_driver_is_a_runtime_error_that_names_the_op_and_what_it_was_given():
    done = subprocess.run(
        [sys.executable, "-c", SPOILED_CAPTURE],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
    )
    messages = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert list(messages) == list(OPS), done.stderr
    for op, message in messages.items():
        assert re.match(rf"{op}: .*capture", message), message
        assert re.search(r"\(\d+, \d+", message), message
