"""A training step on whole models against plain inference on the same tokens.

    python benchmarks/bench_step.py --quick                       # what has a target
    python benchmarks/bench_step.py                               # and the slow loops
    python benchmarks/bench_step.py --model OPT-13B --tokens 16x32 --quick --profile
    python benchmarks/bench_step.py --model OPT-13B --tokens 16x32 --queries 8
    python benchmarks/bench_step.py --model OPT-13B --sst2        # sentences, padded and packed

Models have random bf16 weights in the shapes of OPT-13B, Llama-3-8B (r = 64) and OPT-1.3B (r = 24).
All parameters are trained; the loss reads two label words at the last position of each example. A
two-sided step with K queries evaluates 2 K groups of the batch.

With --sst2 the batch is 16 sentences as long as SST-2's: padded (608 tokens), and behind each other
in one row (340 tokens, filled up to a multiple of 64), the step captured in both.

Correctness comes first: on small fp32 models rho is the same by the side path and in place, in one
batch and sign by sign. Then the contestants, in two modes:
    eager  bare           one plain forward of the batch, repeated as often as there are groups
           bare, apart    as many plain forwards, one after another
           step           SubZero.step(batch, objective): all groups in one forward
           step, apart    SubZero.step(closure): one group after another, the memory of one
           in place       SubZero(apply="in_place")
           addmm_, eager SubZero, eager MeZO      loops in torch that write W (step_baselines.py)
    graph  bare; bare, apart; step (SubZero.capture); composed, the side path as cuBLAS calls
The captured step must give the loss and the core of the uncaptured one bit for bit, and leave the
weights' checksum as it was. A line of the table is one contestant:
    ms, tok/s     of the device, the median; tokens of all groups
    x bare        its time over that of "bare" in the same mode
    faster        the time of eager SubZero over its own
    host ms       until the call returns, on a model of as many layers and next to no width
    state         MB allocated for as long as the optimizer lives
    peak          MB at most, state included, beyond what the bare forwards take at most
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_bench import attempt, header, machine, release_memory, write_csv
from step_case import COLUMNS, TARGETS, Bench, Case, Sentences
from step_checks import check_small_models
from step_models import CONFIGS, Tokens, build, narrow
from step_options import DTYPES, add_options, output_of
from step_time import host_ms
from torch import nn


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for model in options.model or CONFIGS:
        for queries in options.queries or [1, 8]:
            for tokens in options.tokens or map(Tokens.parse, ("16x32", "16x256", "4x2048")):
                case = Case(model, tokens, queries)
                if options.tokens and options.queries or case.key in TARGETS:
                    yield case


def host_rows(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Host time of an uncaptured step and of the plain forward, by a narrow model."""
    model = build(narrow(shortened(name, options)), options.device, DTYPES[options.dtype])
    case = Case(name, Tokens(2, 8), 1)
    bench = Bench(case, model, options)
    bench.rank = 8
    bare = host_ms(bench.bare(), options.device)
    opt = bench.optimizer()
    step = host_ms(lambda: opt.step(bench.batch, bench.objective), options.device)
    opt.detach()
    print(f"{name}: host {bare:.2f} ms a bare forward, {step:.2f} ms a step")
    common = {"model": name, "queries": 1, "layers": model.config.num_hidden_layers, "mode": "host"}
    return [
        {**common, "contestant": "bare", "host_ms": round(bare, 3)},
        {**common, "contestant": "step", "host_ms": round(step, 3)},
    ]


# ---- the run


def shortened(name: str, options: argparse.Namespace) -> Any:
    config = CONFIGS[name]
    if options.layers:
        config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": options.layers})
    return config


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    begun, where = time.perf_counter(), machine()
    print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    rows: list[dict[str, Any]] = []
    attempt("small models", lambda: check_small_models(options.device))
    try:
        for name in options.model or CONFIGS:
            some = [case for case in cases(options) if case.model == name]
            if options.sst2 and not options.tokens:
                some = []
            elif not some:
                continue
            if options.host:
                rows += attempt(f"{name} host", lambda name=name: host_rows(name, options)) or []
            model = attempt(name, lambda name=name: make(name, options))
            print(header(COLUMNS) if model is not None else f"{name}: left out")
            if options.sst2 and model is not None:
                of_sentences = Sentences(name, model, options)
                attempt(f"{name} sentences", of_sentences.run)
                rows += of_sentences.rows
                del of_sentences
            for case in some if model is not None else []:
                bench = Bench(case, model, options)
                attempt(str(case), bench.run)
                rows += bench.rows
                del bench
                gc.collect()
                release_memory()
            del model
            gc.collect()
            release_memory()
    finally:
        if rows:
            write_csv(options.output, rows, where)
        print(f"{time.perf_counter() - begun:.0f} s")
    return rows


def make(name: str, options: argparse.Namespace) -> nn.Module:
    return build(shortened(name, options), options.device, DTYPES[options.dtype])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="leave out loops that write W and have no target")
    add("--model", nargs="+", choices=CONFIGS)
    add("--queries", nargs="+", type=int, help="K of a two-sided step: 2 K groups")
    add("--sst2", action="store_true", help="16 sentences, padded and packed, instead of --tokens")
    add("--no-host", dest="host", action="store_false", help="leave the host's time out")
    add_options(parser)
    options = parser.parse_args(arguments)
    part = options.model or options.tokens or options.queries or options.layers
    options.output = output_of(options, "step", part)
    return options


def main(arguments: list[str]) -> None:
    torch.set_grad_enabled(False)
    run(parse(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
