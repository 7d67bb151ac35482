"""What the GPU benchmarks share: how to time, the ceilings of the memory, shapes, the CSV.

Times are those of the GPU alone: a call is captured in a CUDA graph, replayed between two CUDA
events, and the median of several repeats is taken. What is compared is timed in turn, so that a
warm or busy GPU slows all alike. Without a GPU everything runs by the wall clock, so that a
test can see that a benchmark works.

    calls = rotated(lambda: make(...), bytes_each)      # buffers past the L2, one call for each
    us = interleaved_us({"ours": calls, "addmm_": others})
    ceilings = measure_ceilings(device)                 # TB/s of a copy and of an in-place add
    rows = attempt("label", lambda: measure(...)) or []   # one failure does not stop the rest
    write_csv(path, rows, machine())
"""

from __future__ import annotations

import csv
import datetime
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from subzero_kernels import backends

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


# ---- time


class _Captured:
    """Some calls as one CUDA graph, and how often it is replayed between two events."""

    def __init__(self, calls: Sequence[Call], least_ms: float) -> None:
        self._count = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:  # loads kernels, makes workspaces, compiles
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self._replays = 1
        self.us()  # the first replay uploads the graph
        once = self.us() * self._count / 1e3
        self._replays = max(1, min(200, round(least_ms / max(once, 1e-3))))

    def us(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / (self._replays * self._count)


class _Repeated:
    """Calls on the CPU, one after another, by the wall clock."""

    def __init__(self, calls: Sequence[Call], least_ms: float) -> None:
        self._calls = calls
        self.us()

    def us(self) -> float:
        start = time.perf_counter()
        for call in self._calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(self._calls)


def interleaved_us(
    contestants: Mapping[str, Call | Sequence[Call]], repeats: int = 7, least_ms: float = 3.0
) -> dict[str, float]:
    """Microseconds of one call of each contestant, the medians of interleaved repeats.

    A contestant is a call without arguments or several, one for each rotated buffer. A measurement
    lasts ``least_ms`` or longer.
    """
    timed = _Captured if torch.cuda.is_available() else _Repeated
    captured = {
        name: timed([calls] if callable(calls) else list(calls), least_ms)
        for name, calls in contestants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(repeats):
        for name, graph in captured.items():
            times[name].append(graph.us())
    return {name: statistics.median(values) for name, values in times.items()}


def time_us(call: Call | Sequence[Call], repeats: int = 7, least_ms: float = 3.0) -> float:
    """:func:`interleaved_us` of one contestant."""
    return interleaved_us({"": call}, repeats, least_ms)[""]


def copies_past(cache: int, bytes_each: int) -> int:
    """How many buffers it takes, used in turn, for none to be in a cache when its turn comes.

    One does where it is four times as large as the cache, and in any case as large as weights get.
    """
    most = 4 * cache
    return 1 if bytes_each >= most else min(512, 1 + -(-most // max(1, bytes_each)))


def buffers_needed(bytes_each: int, device: int = 0) -> int:
    """:func:`copies_past` the GPU's L2 cache."""
    if not torch.cuda.is_available():
        return 1
    return copies_past(torch.cuda.get_device_properties(device).L2_cache_size, bytes_each)


def rotated(make: Callable[[], Any], bytes_each: int, device: int = 0) -> list[Any]:
    """Calls, or what makes them, on buffers of their own: none finds its data in the L2 cache."""
    return [make() for _ in range(buffers_needed(bytes_each, device))]


def peak_bytes(call: Call) -> int:
    """Bytes of GPU memory that a call allocates beyond what is allocated before it."""
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Ceilings(NamedTuple):
    """Bytes read plus bytes written, in TB/s."""

    copy: float
    add: float


def measure_ceilings(device: int | str | torch.device = 0, nbytes: int = 1 << 31) -> Ceilings:
    """What a copy and an in-place add reach on this device now: the faster of fp32 and bf16."""
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.empty_like(source)
    halves = source.view(torch.bfloat16)
    us = interleaved_us(
        {
            "copy": lambda: target.copy_(source),
            "add fp32": lambda: source.add_(1.0),
            "add bf16": lambda: halves.add_(1.0),
        }
    )
    speed = {name: 2 * nbytes / each / 1e6 for name, each in us.items()}
    return Ceilings(speed["copy"], max(speed["add fp32"], speed["add bf16"]))


# ---- the contestants


def usable(names: Sequence[str]) -> list[str]:
    """Those of the backends that run here; says why of each."""
    found = []
    for name in names:
        module, why = backends.load(name)
        print(f"{name}: {why}")
        if module is not None:
            found.append(name)
    return found


def on_backend(name: str, call: Call) -> Call:
    """The call with SUBZERO_BACKEND set, which the ops read each time."""

    def run() -> None:
        os.environ[backends.VARIABLE] = name
        call()

    return run


def attempt(label: str, call: Callable[[], Any]) -> Any:
    """What the call returns; None, said aloud, where it fails: the others are worth their time."""
    try:
        return call()
    except Exception as failure:
        print(f"{label}: FAILED, {type(failure).__name__}: {failure}", flush=True)
        return None


def those_that_run(label: object, calls: dict[str, list[Call]]) -> dict[str, list[Call]]:
    """Without the contestants whose first call fails, which is said aloud."""

    def runs(call: Call) -> bool:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True

    return {
        name: each
        for name, each in calls.items()
        if attempt(f"{label} {name}", lambda each=each: runs(each[0]))
    }


def release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- where and what


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(device: int = 0) -> dict[str, str]:
    """The hardware and the versions that a result holds for."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    here = str(Path(__file__).parent)
    commit = os.environ.get("BENCH_COMMIT") or _output(
        ["git", "-C", here, "describe", "--always", "--dirty"]
    )
    triton = ""
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    return {
        "gpu": torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none",
        "driver": (_output(query).splitlines() or ["unknown"])[0],
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def write_csv(
    path: str | Path, rows: Sequence[Mapping[str, Any]], where: Mapping[str, str]
) -> Path:
    """Rows with the columns of the first that has them, each followed by where it was measured."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, [*columns, *where], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({**row, **where} for row in rows)
    print(f"written: {path}")
    return path


# ---- a table on the screen: (name in a row, title, format) for each column


def header(columns: Sequence[tuple[str, str, str]]) -> str:
    return " ".join(f"{title:{form.partition('.')[0]}}" for _, title, form in columns)


def line(row: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> str:
    """A row under its header; empty where it has nothing."""
    cells = []
    for name, _, form in columns:
        value = row.get(name, "")
        cells.append(f"{value:{form if value != '' else form.partition('.')[0]}}")
    return " ".join(cells)


# ---- one kernel under the profiler


def profile_once(call: Call) -> None:
    """One warm call, then one between the marks that ncu and nsys look for."""
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def under_ncu(arguments: Sequence[str]) -> int:
    """Run this very script under ncu with other arguments, which make it call profile_once."""
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is missing: install NVIDIA Nsight Compute, or put it on PATH")
        return 1
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--set", "detailed"]
    return subprocess.run([*command, sys.executable, sys.argv[0], *arguments]).returncode
