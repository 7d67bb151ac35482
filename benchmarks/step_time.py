"""How a step is timed: as it is called, host and all, or as a CUDA graph that is replayed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from gpu_bench import Call

from subzero.masks import packed_as_before


@dataclass(frozen=True)
class Timer:
    """Times ``repeats`` spans of calls, each of ``least_ms`` or longer."""

    device: str
    repeats: int
    least_ms: float

    def ms(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Milliseconds of one call of each, the medians of interleaved spans, after two calls."""
        counts = {}
        for name, call in calls.items():
            call()
            once = self._span_ms(call, 1)
            counts[name] = max(1, min(50, round(self.least_ms / max(once, 1e-3))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.repeats):
            for name, call in calls.items():
                times[name].append(self._span_ms(call, counts[name]))
        return {name: statistics.median(each) for name, each in times.items()}

    def _span_ms(self, call: Call, count: int) -> float:
        if self.device == "cpu":
            begun = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - begun) * 1e3 / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count


def graphed(call: Call, device: str) -> Call:
    """The call as a CUDA graph; where there are none, the call.

    In a capture transformers would make a mask where it makes none otherwise, and take a slower
    kernel: the graph gets what it does otherwise, as SubZero's do.
    """
    if device == "cpu":
        return call
    with packed_as_before({}) as packed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        packed.repeat()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def host_ms(call: Call, device: str, repeats: int = 15) -> float:
    """Until the call returns; the device is idle before it."""
    times = []
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times[2:])


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
