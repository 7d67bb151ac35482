"""perturb_, perturb_many_ and fold_ on a GPU against the memory's own speed and what torch offers.

    python benchmarks/bench_perturb.py --quick             # what has a target, no torch.compile
    python benchmarks/bench_perturb.py                     # all shapes, dtypes, ranks
    python benchmarks/bench_perturb.py --shape 5120x5120 --dtype bf16 --rank 64 --backend cuda
    python benchmarks/bench_perturb.py --profile --shape 5120x5120 --dtype bf16 --rank 64
    python benchmarks/bench_perturb.py --plot --output benchmarks/results/perturb_h200.csv

Each backend makes one call over all weights of a case (fold_: one for each weight, rounding
stochastically), noise regenerated, W written once. It is compared, in turn, with
    eager      W += eps * mu * (U @ Z @ V.T), with mu Z already there
    addmm_     W.addmm_(U mu Z, V^T, alpha=eps), likewise
    compiled   torch.compile of the eager line
    add_       W += 1 on the same weights: reads and writes W and does nothing else

Correctness comes first: rows of every matrix against float64, within the contract's bound. Then the
ceilings: a copy and an in-place add of 2 GiB in the same run. A line of the table is one backend:
    us, TB/s      of the GPU alone; bytes of W read plus written
    of add        fraction of the in-place-add ceiling; same: of add_ on the same weights
    x eager ...   how many times as long the baselines take
    peak          bytes allocated beyond the arguments
    host us       until the call returns; lists: of the op that takes lists, without a plan
    error         of the worst matrix, as a fraction of what the contract allows
What has a target comes first; a model that the free memory cannot hold is cut to the layers that
fit, and named so; a case that fails stops no other. The CSV in benchmarks/results has a row for
each contestant, the plot is made from it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_bench import (
    RESULTS,
    Call,
    Ceilings,
    attempt,
    header,
    interleaved_us,
    line,
    machine,
    measure_ceilings,
    on_backend,
    peak_bytes,
    profile_once,
    release_memory,
    rotated,
    those_that_run,
    under_ncu,
    usable,
    write_csv,
)
from model_shapes import MODELS, RANKS, fitted, memory_for_weights, opt_13b_lora, whole
from perturb_weights import DTYPES, Case, Weights, worst_error

import subzero_kernels as sk
from subzero_kernels import backends

LORA = "OPT-13B LoRA"
SHAPES = [(5120, 5120), (20480, 5120), (50272, 5120), (4096, 14336), (5119, 5121), (4093, 1151)]
SHAPES += [(64, 64)]
SHAPE_RANKS = [8, 16, 24, 64, 128]

# Fractions of the in-place-add ceiling that the kernels were built for, 16 bits and fp32.
TARGETS = {
    ("perturb_many_", "OPT-13B", 64): (0.95, 0.95),
    ("perturb_many_", "OPT-1.3B", 24): (0.93, 0.93),
    ("perturb_", "5120x5120", 64): (0.90, 0.93),
    ("perturb_", "5120x5120", 128): (0.85, 0.90),
    ("fold_", "OPT-13B", 64): (0.90, None),
}
TARGETS_US = {("perturb_many_", LORA, 8): 60.0}


# ---- cases


def model_cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.shape:
        return
    memory = memory_for_weights(options.device)
    for name in options.model or MODELS:
        for dtype in options.dtype or DTYPES:
            size = DTYPES[dtype].itemsize
            found = attempt(
                name, lambda name=name, size=size: fitted(name, MODELS[name], size, memory)
            )
            if not found:
                continue
            what, shapes = found[0], found[1].matrices
            for rank in options.rank or [RANKS[name]]:
                yield Case("perturb_many_", what, shapes, shapes, dtype, rank)
                yield Case("fold_", what, shapes, shapes, dtype, rank)


def lora_cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.shape or options.model:
        return
    shapes = opt_13b_lora()
    square = [sk.factor_shape(shape, "square") for shape in shapes]
    for dtype in options.dtype or DTYPES:
        yield Case("perturb_many_", LORA, shapes, square, dtype, 8)


def single_cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.model:
        return
    for shape in options.shape or SHAPES:
        for dtype in options.dtype or DTYPES:
            for rank in options.rank or SHAPE_RANKS:
                if rank <= min(shape):
                    what = "x".join(map(str, shape))
                    yield Case("perturb_", what, [shape], [shape], dtype, rank)


def target_of(op: str, what: str, dtype: str, rank: int) -> tuple[str, float] | None:
    """A column of the row and the number that it should reach: us at most, of_add at least."""
    key = op, whole(what), rank
    if key in TARGETS_US:
        return "us", TARGETS_US[key]
    least = TARGETS.get(key, (None, None))[dtype == "fp32"]
    return None if least is None else ("of_add", least)


def has_target(case: Case) -> bool:
    return target_of(case.op, case.what, case.dtype, case.rank) is not None


def weights_key(case: Case) -> tuple[str, str, int]:
    """Cases of one key are measured on the same weights."""
    return case.what, case.dtype, case.rank


def cases(options: argparse.Namespace) -> list[Case]:
    """What has a target comes first, and next to it what is measured on the same weights."""
    found = [*model_cases(options), *lora_cases(options), *single_cases(options)]
    if options.quick:
        return [case for case in found if has_target(case)]
    first = {weights_key(case) for case in found if has_target(case)}
    return sorted(found, key=lambda case: weights_key(case) not in first)


# ---- one case


def host_us(call: Call, repeats: int = 20) -> float:
    """Microseconds until the call returns; the GPU is idle before it."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def errors_of_right_ones(case: Case, weights: Weights, ours: list[str]) -> dict[str, float]:
    """By backend, the error; without those that fail or are wrong, which is said aloud."""
    found = {}
    for name in ours:
        os.environ[backends.VARIABLE] = name
        label = f"{case} {name}"
        error = attempt(label, lambda: worst_error(weights, case.op))
        if error is not None and error <= 1:
            found[name] = error
        elif error is not None:
            print(f"{label}: WRONG, {error:.3g} times the error allowed", flush=True)
    return found


def baselines(case: Case, options: argparse.Namespace) -> list[str]:
    # Each shape, dtype and rank takes a second or two to compile; fp16 is as fast as bf16.
    compiled = options.compile and not options.quick and case.dtype != "fp16"
    if compiled and (case.op != "perturb_" or case.rank == 64):
        return ["eager", "addmm_", "compiled"]
    return ["eager", "addmm_"]


def measure(
    case: Case,
    copies: list[Weights],
    ours: list[str],
    ceilings: Ceilings,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each contestant."""
    first = copies[0]
    errors = errors_of_right_ones(case, first, ours)
    calls = {name: [on_backend(name, each.call(case.op)) for each in copies] for name in errors}
    for name in baselines(case, options):
        calls[name] = [each.line(name) for each in copies]
    calls["add_"] = [each.add_ for each in copies]
    calls = those_that_run(case, calls)
    times = interleaved_us(calls, options.repeats)
    rows = []
    for name, us in times.items():
        speed = 2 * case.bytes / us / 1e6
        row: dict[str, Any] = {
            "op": case.op,
            "what": case.what,
            "matrices": len(case.shapes),
            "dtype": case.dtype,
            "rank": case.rank,
            "kind": first.kind,
            "contestant": name,
            "us": round(us, 2),
            "tb_s": round(speed, 4),
            "of_add": round(speed / ceilings.add, 4),
            "of_same_add": round(times["add_"] / us, 4),
        }
        for other in ("eager", "addmm_", "compiled"):
            row[f"x_{other}"] = round(times[other] / us, 3) if other in times else ""
        row["peak_bytes"] = peak_bytes(calls[name][0])
        row["host_us"] = row["host_lists_us"] = row["error"] = ""
        if name in errors:
            row["error"] = round(errors[name], 4)
            row["host_us"] = round(host_us(calls[name][0]), 1)
            if case.op == "perturb_many_":
                lists = on_backend(name, first.perturb_lists_)
                row["host_lists_us"] = round(host_us(lists), 1)
            show(row)
        rows.append({**row, "copy_tb_s": ceilings.copy, "add_tb_s": ceilings.add})
    return rows


# ---- the table

COLUMNS = [
    ("op", "op", "<14"),
    ("what", "what", "<13"),
    ("dtype", "dtype", "<5"),
    ("rank", "rank", ">4"),
    ("contestant", "backend", "<9"),
    ("us", "us", ">9.1f"),
    ("tb_s", "TB/s", ">6.3f"),
    ("of_add", "of add", ">6.3f"),
    ("of_same_add", "same", ">5.2f"),
    ("x_eager", "x eager", ">7.2f"),
    ("x_addmm_", "addmm_", ">6.2f"),
    ("x_compiled", "compiled", ">8.2f"),
    ("peak_bytes", "peak", ">8"),
    ("host_us", "host us", ">8.1f"),
    ("host_lists_us", "lists", ">7.1f"),
    ("error", "error", ">5.2f"),
]


def show(row: dict[str, Any]) -> None:
    print(line(row, COLUMNS) + verdict(row), flush=True)


def verdict(row: dict[str, Any]) -> str:
    target = target_of(row["op"], row["what"], row["dtype"], row["rank"])
    if target is None:
        return ""
    column, number = target
    met = row[column] <= number if column == "us" else row[column] >= number
    shown = f"{number:.0f} us" if column == "us" else f"{number:.2f}"
    return f"  target {shown} {'met' if met else 'MISSED'}"


# ---- the run


def weights_of(case: Case, device: str) -> list[Weights]:
    """Weights of the case; as many of them as it takes to leave the cache, if they are small."""
    return rotated(lambda: Weights(case, device), case.bytes)


def run(options: argparse.Namespace) -> None:
    begun, where = time.perf_counter(), machine()
    print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    ours = usable(options.backend)
    ceilings = measure_ceilings(options.device, options.ceiling_bytes)
    print(f"ceilings, TB/s: copy {ceilings.copy:.3f}, in-place add {ceilings.add:.3f}")
    print(header(COLUMNS))
    rows: list[dict[str, Any]] = []
    try:
        for _, group in itertools.groupby(cases(options), weights_key):
            rows += measured_group(list(group), ours, ceilings, options)
            release_memory()  # fp32 weights of 13B leave no room for others
    finally:
        if rows:
            write_csv(options.output, rows, where)
        print(f"{time.perf_counter() - begun:.0f} s")


def measured_group(
    group: list[Case], ours: list[str], ceilings: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of cases that share their weights; of those that fail, none."""
    copies = attempt(str(group[0]), lambda: weights_of(group[0], options.device))
    rows: list[dict[str, Any]] = []
    for case in group if copies else []:

        def one(case: Case = case) -> list[dict[str, Any]]:
            return measure(case, copies, ours, ceilings, options)

        rows += attempt(str(case), one) or []
    return rows


def profile(options: argparse.Namespace) -> None:
    """One call of the first case on the first backend, for ncu."""
    case = cases(options)[0]
    call = on_backend(options.backend[0], Weights(case, options.device).call(case.op))
    profile_once(call)


def shape(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="what has a target, without torch.compile")
    add("--backend", nargs="+", default=["cuda", "triton"], choices=backends.NAMES)
    add("--dtype", nargs="+", choices=DTYPES)
    add("--rank", nargs="+", type=int)
    add("--shape", nargs="+", type=shape, metavar="5120x5120", help="only perturb_ on these")
    add("--model", nargs="+", choices=MODELS, help="only these whole models")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--repeats", type=int, default=7, help="measurements, of which the median is taken")
    add("--profile", action="store_true", help="one call of the first case, in ncu")
    add("--profiled", action="store_true", help=argparse.SUPPRESS)  # what ncu runs
    add("--plot", action="store_true", help="draw what is in --output, measure nothing")
    add("--output", type=Path, help="CSV; default benchmarks/results/perturb_GPU[_quick].csv")
    add("--device", default="cuda", help="cpu: whether the script works, with other --backend")
    add("--ceiling-bytes", type=int, default=1 << 31, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output is None:
        gpu = machine()["gpu"].lower().replace("nvidia", "").split()[0]
        part = options.shape or options.model or options.dtype or options.rank
        kind = "_quick" if options.quick else "_part" if part else ""
        options.output = RESULTS / f"perturb_{gpu}{kind}.csv"
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_grad_enabled(False)
    if options.plot:
        from plot_perturb import plot

        plot(options.output)
    elif options.profile:
        sys.exit(under_ncu([a for a in arguments if a != "--profile"] + ["--profiled"]))
    elif options.profiled:
        profile(options)
    else:
        run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
