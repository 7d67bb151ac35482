"""Where a step's time beyond the bare forward goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def kernels(call: Callable[[], Any], device: str) -> dict[str, tuple[int, float]]:
    """How often each kernel runs in a call (on a CPU: each op), and its milliseconds in all."""
    cpu = device == "cpu"
    activity = ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA
    call()
    with profile(activities=[activity]) as recorded:
        call()
        if not cpu:
            torch.cuda.synchronize()
    found = {}
    for event in recorded.key_averages():
        us = event.self_cpu_time_total if cpu else event.self_device_time_total
        if us > 0:
            found[event.key] = (event.count, us / 1e3)
    return found


def compare_kernels(
    bare: Callable[[], Any], step: Callable[[], Any], device: str, most: int = 30
) -> None:
    """Print the kernels of both, those first that take longer in the step."""
    before, after = kernels(bare, device), kernels(step, device)
    none = (0, 0.0)
    rows = [(name, *before.get(name, none), *after.get(name, none)) for name in before | after]
    rows.sort(key=lambda row: -abs(row[4] - row[2]))
    print(f"{'bare: times':>11}{'ms':>9}{'step: times':>13}{'ms':>9}{'more':>9}  kernel")
    for name, times, ms, step_times, step_ms in rows[:most]:
        more = step_ms - ms
        print(f"{times:>11}{ms:>9.3f}{step_times:>13}{step_ms:>9.3f}{more:>+9.3f}  {name[:100]}")
    sums = [sum(row[c] for row in rows) for c in range(1, 5)]
    print(
        f"{sums[0]:>11}{sums[1]:>9.3f}{sums[2]:>13}{sums[3]:>9.3f}{sums[3] - sums[1]:>+9.3f}  all",
        flush=True,
    )
