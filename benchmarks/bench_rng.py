"""The ops that make noise for every element, on a GPU, against what torch offers.

    python benchmarks/bench_rng.py                        # all: a minute
    python benchmarks/bench_rng.py --quick                # what has a target, without torch.compile
    python benchmarks/bench_rng.py --op perturb_dense_ --dtype bf16 --backend cuda
    python benchmarks/bench_rng.py --profile add_noise_   # one call in ncu

Compared, in turn: each backend, the eager line (torch.randn and an add), torch.compile of it, and
add_, which reads and writes the same memory and does nothing else. Noise that torch makes cannot be
made again without its generator's state; ours is a function of seed, stream and draw.

Correctness comes first: chosen rows, or all of noise_outer_, against float64. Then the ceilings, a
copy and an in-place add of 2 GiB in the same run. What has a target comes
first; a model that the free memory cannot hold is cut to the layers that fit, and named so; a case
that fails stops no other. A line of the table is one backend:
    us            of the GPU alone
    G/s           normals made, in 10^9
    TB/s, of add  bytes of the noisy tensors read plus written; as a fraction of the add's ceiling
    x eager ...   how many times as long the baselines take
    peak          bytes allocated beyond the arguments
    error         as a fraction of what the contract allows
The CSV in benchmarks/results has a row for each contestant.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_bench import (
    RESULTS,
    Call,
    Ceilings,
    attempt,
    buffers_needed,
    header,
    interleaved_us,
    line,
    machine,
    measure_ceilings,
    on_backend,
    peak_bytes,
    profile_once,
    release_memory,
    those_that_run,
    under_ncu,
    usable,
    write_csv,
)
from model_shapes import MODELS, Model, fitted, memory_for_weights, whole
from rng_work import DTYPES, WORK, Case, Work

from subzero_kernels import backends

# Fractions of the in-place-add ceiling that the kernels were built for, 16 bits and fp32.
TARGETS = {
    ("perturb_dense_", "OPT-13B"): (0.60, 0.85),
    ("add_noise_", "all rows"): (0.60, 0.85),
}
OUTER_TARGET = 1.3  # times normal_ for as many normals
SPARSE_TARGET = 5.0  # us more than the noisy rows alone


TINY = Model(2, [(33, 40), (40,)], [(7, 8)])
TINY_SIZE = dict(rows=70, columns=36, queries=2, width=5)


def cases(options: argparse.Namespace) -> list[Case]:
    """What has a target comes first."""
    what = {
        "perturb_dense_": ["tiny"] if options.tiny else list(MODELS),
        "add_noise_": ["all rows", "those alone", "every 32nd"],
        "noise_outer_": ["all rows"],
        "core_noise_": ["update", "both signs"],
        "normal_": ["as noise_outer_"],
    }
    found = []
    for op, kinds in what.items():
        if op not in (options.op or WORK):
            continue
        for kind in kinds:
            for dtype in ["fp32"] if op == "core_noise_" else options.dtype or DTYPES:
                found += case_of(op, kind, dtype, options)
    found.sort(key=lambda case: not has_target(case))
    return [case for case in found if has_target(case)] if options.quick else found


def case_of(op: str, what: str, dtype: str, options: argparse.Namespace) -> list[Case]:
    """The case, or none, said aloud, of a model of which no layer fits."""
    if op != "perturb_dense_":
        return [Case(op, what, dtype, **(TINY_SIZE if options.tiny else {}))]
    model = TINY if options.tiny else MODELS[what]
    memory = memory_for_weights(options.device)
    found = attempt(what, lambda: fitted(what, model, DTYPES[dtype].itemsize, memory))
    return [Case(op, found[0], dtype, shapes=tuple(found[1].tensors))] if found else []


def has_target(case: Case) -> bool:
    """Those alone have none of their own: every 32nd is measured by them."""
    return case.op in ("add_noise_", "noise_outer_") or (case.op, whole(case.what)) in TARGETS


# ---- one case


def errors_of_right_ones(case: Case, work: Work, names: list[str]) -> dict[str, float]:
    """By backend, the error; without those that fail or are wrong, which is said aloud."""
    found = {}
    for name in names:
        os.environ[backends.VARIABLE] = name
        error = attempt(f"{case}{name}", work.worst_error)
        if error is not None and error <= 1:
            found[name] = error
        elif error is not None:
            print(f"{case}{name}: WRONG, {error:.3g} times the error allowed", flush=True)
    return found


def contestants(
    case: Case, copies: list[Work], names: list[str], options: argparse.Namespace
) -> dict[str, list[Call]]:
    """By name, a call for each copy of the arguments; the compiled line only where it compiles."""
    calls = {name: [on_backend(name, work.ours) for work in copies] for name in names}
    compiled = options.compile and not options.quick and case.dtype != "fp16"
    lines = [work.baselines(compiled) for work in copies]
    for name in lines[0]:
        calls[name] = [on_backend(names[0], each[name]) for each in lines]  # normal_ is ours too
    return those_that_run(case, calls)


def measure(
    case: Case,
    copies: list[Work],
    names: list[str],
    ceilings: Ceilings,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each contestant."""
    work = copies[0]
    errors = errors_of_right_ones(case, work, names)
    if not errors:
        return []
    calls = contestants(case, copies, list(errors), options)
    times = interleaved_us(calls, options.repeats)
    rows = []
    for name, us in times.items():
        speed = work.bytes / us / 1e6
        row: dict[str, Any] = {
            "op": case.op,
            "what": case.what,
            "dtype": case.dtype,
            "kind": work.kind,
            "contestant": name,
            "us": round(us, 2),
            "gnormals_s": round(work.normals / us / 1e3, 1),
            "tb_s": round(speed, 4) if work.bytes else "",
            "of_add": round(speed / ceilings.add, 4) if work.bytes else "",
        }
        for other in ("eager", "compiled", "add_", "normal_"):
            row[f"x_{other}"] = round(times[other] / us, 3) if other in times else ""
        row["peak_bytes"] = peak_bytes(calls[name][0])
        row["error"] = round(errors[name], 4) if name in errors else ""
        rows.append({**row, "copy_tb_s": ceilings.copy, "add_tb_s": ceilings.add})
    return rows


# ---- the table

COLUMNS = [
    ("op", "op", "<14"),
    ("what", "what", "<15"),
    ("dtype", "dtype", "<5"),
    ("contestant", "backend", "<9"),
    ("us", "us", ">9.1f"),
    ("gnormals_s", "G/s", ">6.1f"),
    ("tb_s", "TB/s", ">6.3f"),
    ("of_add", "of add", ">6.3f"),
    ("x_eager", "x eager", ">7.2f"),
    ("x_compiled", "compiled", ">8.2f"),
    ("x_add_", "add_", ">5.2f"),
    ("peak_bytes", "peak", ">10"),
    ("error", "error", ">5.2f"),
]


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(line(row, COLUMNS) + verdict(row, rows), flush=True)


def verdict(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Whether the target is met, if there is one; ``rows`` are all so far."""
    least = TARGETS.get((row["op"], whole(row["what"])), (None, None))[row["dtype"] == "fp32"]
    if least is not None:
        return f"  target {least:.2f} {'met' if row['of_add'] >= least else 'MISSED'}"
    if row["op"] == "noise_outer_" and row["x_normal_"] != "":
        times = 1 / row["x_normal_"]
        met = "met" if times <= OUTER_TARGET else "MISSED"
        return f"  {times:.2f} x normal_, target {OUTER_TARGET} {met}"
    if row["op"] == "add_noise_" and row["what"] == "every 32nd":
        same = {"op": "add_noise_", "what": "those alone"}
        same |= {name: row[name] for name in ("dtype", "contestant")}
        for other in rows:
            if all(other[name] == value for name, value in same.items()):
                more = row["us"] - other["us"]
                met = "met" if more <= SPARSE_TARGET else "MISSED"
                return f"  alone + {more:.1f} us, target {SPARSE_TARGET} {met}"
    return ""


# ---- the run


def copies_of(case: Case, device: str) -> list[Work]:
    """The arguments; as often as it takes to leave the cache, if they are small."""
    make = WORK[case.op]
    first = make(case, device)
    if first.bytes == 0 or case.op == "core_noise_":
        return [first]
    count = buffers_needed(first.normals * first.dtype.itemsize)
    return [first, *(make(case, device) for _ in range(count - 1))]


def run(options: argparse.Namespace) -> None:
    begun, where = time.perf_counter(), machine()
    print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    names = usable(options.backend)
    ceilings = measure_ceilings(options.device, 1 << 20 if options.tiny else 1 << 31)
    print(f"ceilings, TB/s: copy {ceilings.copy:.3f}, in-place add {ceilings.add:.3f}")
    print(header(COLUMNS))
    rows: list[dict[str, Any]] = []
    try:
        for case in cases(options):
            release_memory()  # fp32 weights of 13B leave no room for others
            measured = attempt(
                str(case), lambda case=case: measured_anew(case, names, ceilings, options)
            )
            for row in measured or []:
                if row["error"] != "":
                    show(row, [*rows, *measured])
            rows += measured or []
    finally:
        if rows:
            write_csv(options.output, rows, where)
        print(f"{time.perf_counter() - begun:.0f} s")


def measured_anew(
    case: Case, names: list[str], ceilings: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    return measure(case, copies_of(case, options.device), names, ceilings, options)


def profile(options: argparse.Namespace) -> None:
    """One call of an op's first case on the first backend, for ncu."""
    case = cases(options)[0]
    profile_once(on_backend(options.backend[0], WORK[case.op](case, options.device).ours))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="what has a target, without torch.compile")
    add("--op", nargs="+", choices=WORK, help="only these")
    add("--backend", nargs="+", default=["cuda", "triton"], choices=backends.NAMES)
    add("--dtype", nargs="+", choices=DTYPES)
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--repeats", type=int, default=7, help="measurements, of which the median is taken")
    add("--profile", choices=WORK, metavar="OP", help="one call of its first case, in ncu")
    add("--profiled", choices=WORK, help=argparse.SUPPRESS)  # what ncu runs
    add("--output", type=Path, help="CSV; default benchmarks/results/rng_GPU[_quick|_part].csv")
    add("--device", default="cuda", help="cpu: whether the script works, with other --backend")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output is None:
        gpu = machine()["gpu"].lower().replace("nvidia", "").split()[0]
        kind = "_quick" if options.quick else "_part" if options.op or options.dtype else ""
        options.output = RESULTS / f"rng_{gpu}{kind}.csv"
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_grad_enabled(False)
    if options.profile:
        rest = [a for a in arguments if a not in ("--profile", options.profile)]
        sys.exit(under_ncu([*rest, "--profiled", options.profile]))
    elif options.profiled:
        options.op = [options.profiled]
        profile(options)
    else:
        run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
