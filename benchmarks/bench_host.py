"""What a call on a whole model costs the host: the ops on lists, for 242 matrices as OPT-13B has.

    python benchmarks/bench_host.py                    # on a GPU, by both of its backends
    python benchmarks/bench_host.py --device cpu       # by cpu; its arithmetic is in the time

The matrices are tiny, 4 x 6 at rank 1, so that little but the call is measured; the time ends when
the call returns, and a GPU is idle when it begins. Medians in microseconds of
    again   the same tensors as at the call before, as in any loop
    first   tensors that no call has seen, which are checked in full and described to the backend
    plan    perturb_many_ through perturb_plan, which has no first call
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from gpu_bench import usable

import subzero_kernels as sk
from subzero_kernels import backends, known

COUNT = 242


def host_us(call: Callable[[], object], repeats: int, before: Callable[[], object]) -> float:
    """Microseconds until the call returns, the median."""
    times = []
    for _ in range(repeats):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[1:])


def calls(device: str) -> dict[str, Callable[[], object]]:
    ws = [torch.zeros(4, 6, device=device) for _ in range(COUNT)]
    us = [torch.ones(4, 1, device=device) for _ in ws]
    vs = [torch.ones(6, 1, device=device) for _ in ws]
    cores = [torch.zeros(1, 1, device=device) for _ in ws]
    outs = [core[None] for core in cores]
    coeff, rng = torch.tensor([1e-3], device=device), sk.make_rng(1, 2, device)
    streams = [sk.stream_id(sk.PURPOSE_CORE, i) for i in range(COUNT)]
    mu, plan = [1.0] * COUNT, sk.perturb_plan(ws, us, vs, streams)
    table = coeff[None]
    return {
        "plan": lambda: plan.perturb_(coeff, rng),
        "perturb_many_": lambda: sk.perturb_many_(ws, us, vs, coeff, rng, streams=streams),
        "perturb_dense_": lambda: sk.perturb_dense_(ws, coeff, rng, streams=streams),
        "core_noise_": lambda: sk.core_noise_(outs, cores, table, rng, streams=streams, mu=mu),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="+", choices=backends.NAMES)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args(arguments)
    named = options.backend or (["cuda", "triton"] if options.device == "cuda" else ["cpu"])
    names = usable(named)
    print(f"{'backend':<10}{'call':<15}{'again':>9}{'first':>9}  us")
    with torch.no_grad():
        for name in names:
            os.environ[backends.VARIABLE] = name
            for op, call in calls(options.device).items():
                again = host_us(call, options.repeats, lambda: None)
                first = ""
                if op != "plan":
                    first = f"{host_us(call, 1 + options.repeats // 10, known.forget):9.0f}"
                print(f"{name:<10}{op:<15}{again:>9.0f}{first}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
