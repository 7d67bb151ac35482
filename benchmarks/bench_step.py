"""A training step on whole models against plain inference on the same tokens.

    python benchmarks/bench_step.py --quick                       # what has a target
    python benchmarks/bench_step.py                               # and the slow loops
    python benchmarks/bench_step.py --model OPT-13B --tokens 16x32 --quick --profile
    python benchmarks/bench_step.py --model OPT-13B --tokens 16x32 --queries 8

Models have random bf16 weights in the shapes of OPT-13B, Llama-3-8B (r = 64) and OPT-1.3B (r = 24).
All parameters are trained; the loss reads two label words at the last position of each example. A
two-sided step with K queries evaluates 2 K groups of the batch.

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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_bench import RESULTS, Call, attempt, machine, peak_bytes, release_memory, write_csv
from model_shapes import RANKS
from step_baselines import EPS, LR, Composed, addmm_subzero, eager_mezo, eager_subzero
from step_checks import check_small_models, checksum, restart, same_bits, values_of
from step_models import CONFIGS, LABEL_WORDS, Tokens, build, make_batch, narrow, plain_losses
from step_profile import compare_kernels
from step_time import Timer, allocated, graphed, host_ms
from torch import Tensor, nn

from subzero import SubZero, label_words
from subzero.groups import repeat_batch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOOPS = {"addmm_": addmm_subzero, "eager SubZero": eager_subzero, "eager MeZO": eager_mezo}

# A captured step over the bare forward as a graph, by model, tokens and queries.
TARGETS = {
    ("OPT-13B", "16x32", 1): 1.05, ("OPT-13B", "16x256", 1): 1.03, ("OPT-13B", "4x2048", 1): 1.03,
    ("Llama-3-8B", "16x32", 1): 1.06, ("Llama-3-8B", "16x256", 1): 1.04,
    ("Llama-3-8B", "4x2048", 1): 1.04,
    ("OPT-1.3B", "16x32", 1): 1.15, ("OPT-1.3B", "16x256", 1): 1.06,
    ("OPT-1.3B", "4x2048", 1): 1.05,
    ("OPT-13B", "16x32", 8): 1.04,
}  # fmt: skip
# How many times as long the eager SubZero loop takes.
FASTER = {("OPT-13B", "16x32", 1): 7, ("OPT-13B", "16x256", 1): 1.9, ("OPT-1.3B", "16x32", 1): 12}


class Case(NamedTuple):
    model: str
    tokens: Tokens
    queries: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.model, str(self.tokens), self.queries

    @property
    def groups(self) -> int:
        return 2 * self.queries

    def __str__(self) -> str:
        return f"{self.model} {self.tokens} K={self.queries}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for model in options.model or CONFIGS:
        for queries in options.queries or [1, 8]:
            for tokens in options.tokens or map(Tokens.parse, ("16x32", "16x256", "4x2048")):
                case = Case(model, tokens, queries)
                if options.tokens and options.queries or case.key in TARGETS:
                    yield case


# ---- one case


class Bench:
    """Measures the contestants of one case; ``rows`` grows as they are done."""

    def __init__(self, case: Case, model: nn.Module, options: argparse.Namespace) -> None:
        self.case, self.model, self.options = case, model, options
        vocabulary = model.config.vocab_size
        self.batch = make_batch(case.tokens, vocabulary, options.device, options.padded)
        self.objective = label_words(LABEL_WORDS)
        self.rank = options.rank or min(RANKS[case.model], model.config.hidden_size // 2)
        self.rows: list[dict[str, Any]] = []
        self.timer = Timer(options.device, options.repeats, options.least_ms)

    def losses(self, copies: int) -> Tensor:
        return plain_losses(self.model, repeat_batch(self.batch, copies))

    def bare(self) -> Call:
        batch = repeat_batch(self.batch, self.case.groups)
        return lambda: plain_losses(self.model, batch)

    def apart(self) -> Call:
        def run() -> None:
            for _ in range(self.case.groups):
                self.losses(1)

        return run

    def optimizer(self, **how: Any) -> SubZero:
        return SubZero(self.model, lr=LR, eps=EPS, rank=self.rank, queries=self.case.queries, **how)

    def run(self) -> None:
        options = self.options
        eager = {"bare": self.bare(), "bare, apart": self.apart()}
        times = self.timer.ms(eager)
        peaks = {name: peak_bytes(call) for name, call in eager.items()}
        for name, ms in times.items():
            self.add("eager", name, ms)
        graphs = {name: graphed(call, options.device) for name, call in eager.items()}
        composed = attempt(f"{self.case} composed", self.composed)
        if composed:
            graphs["composed"] = composed
        self.ours(graphs, times["bare"], peaks)
        if options.profile:
            return
        slow = [] if options.quick and self.case.key not in FASTER else ["eager SubZero"]
        if not options.quick and self.case.queries == 1:
            attempt(f"{self.case} in place", lambda: self.in_place(times["bare"]))
            slow = list(LOOPS)
        for name in slow if self.case.queries == 1 else []:
            attempt(f"{self.case} {name}", lambda name=name: self.loop(name, times["bare"]))
            release_memory()
        self.compare_with_loop()

    def composed(self) -> Call:
        contestant = Composed(self.model, self.losses, self.rank, self.case.queries)
        if self.options.device == "cpu":  # without graphs its hooks stay only while it runs

            def run() -> None:
                with contestant.attached():
                    contestant.step()

            return run
        with contestant.attached():
            return graphed(contestant.step, self.options.device)

    def ours(self, graphs: dict[str, Call], bare: float, peaks: dict[str, int]) -> None:
        options, before = self.options, allocated()
        sum_before = checksum(self.model)
        opt = self.optimizer()
        state = allocated() - before

        def together() -> Tensor:
            return opt.step(self.batch, self.objective)

        def closure() -> Tensor:
            return self.objective(self.model, self.batch).mean()

        together()  # compiles kernels, allocates what stays
        state = max(state, allocated() - before)
        for name, call, least in (
            ("step", together, peaks["bare"]),
            ("step, apart", lambda: opt.step(closure), peaks["bare, apart"]),
        ):
            peak = state + peak_bytes(call) - least
            ms = self.timer.ms({name: call})[name]
            self.add("eager", name, ms, bare, state_mb=state / 1e6, peak_mb=peak / 1e6)
        run = opt.capture(self.batch, self.objective)
        self.check_captured(opt, lambda: run(self.batch), together)
        times = self.timer.ms({**graphs, "step": lambda: run(self.batch)})
        for name, ms in times.items():
            self.add("graph", name, ms, times["bare"])
        same = checksum(self.model) == sum_before
        print(f"{self.case}: weights {'unchanged' if same else 'CHANGED'} by the side path")
        if options.profile:
            compare_kernels(graphs["bare"], lambda: run(self.batch), options.device)
        opt.detach()

    def check_captured(self, opt: SubZero, captured: Call, together: Call) -> None:
        """The same step twice, from the same values and the same draw."""
        found = []
        start, draws = [value.clone() for value in values_of(opt)], opt.draws
        for call in (together, captured):
            restart(opt, start, draws)
            found.append((call().clone(), *(value.clone() for value in values_of(opt))))
        same = all(same_bits(a, b) for a, b in zip(*found, strict=True))
        print(f"{self.case}: captured {'equals' if same else 'DIFFERS FROM'} uncaptured")

    def in_place(self, bare: float) -> None:
        opt = self.optimizer(apply="in_place")

        def step() -> Tensor:
            return opt.step(self.batch, self.objective)

        self.add("eager", "in place", self.timer.ms({"": step})[""], bare)
        opt.detach()

    def loop(self, name: str, bare: float) -> None:
        step = LOOPS[name](self.model, self.losses, self.rank)
        self.add("eager", name, self.timer.ms({name: step})[name], bare)

    def compare_with_loop(self) -> None:
        """How many times as fast each contestant is as the eager SubZero loop."""
        loop = [row["ms"] for row in self.rows if row["contestant"] == "eager SubZero"]
        for row in self.rows if loop else []:
            row["faster"] = round(loop[0] / row["ms"], 2)
            if (row["mode"], row["contestant"]) == ("graph", "step"):
                least, verdict = FASTER.get(self.case.key), ""
                if least is not None:
                    met = "met" if row["faster"] >= least else "MISSED"
                    verdict = f", target {least} {met}"
                print(f"{self.case}: {row['faster']} times as fast as eager SubZero{verdict}")

    def add(self, mode: str, name: str, ms: float, bare: float | None = None, **more: Any) -> None:
        case = self.case
        tokens = case.groups * case.tokens.examples * case.tokens.length
        row: dict[str, Any] = {
            "model": case.model,
            "tokens": str(case.tokens),
            "queries": case.queries,
            "groups": case.groups,
            "layers": self.model.config.num_hidden_layers,
            "rank": self.rank,
            "mode": mode,
            "contestant": name,
            "ms": round(ms, 3),
            "tokens_per_s": round(tokens / ms * 1e3),
            "x_bare": round(ms / (bare or ms), 4) if name != "bare" and bare else "",
            "faster": "",
            "host_ms": "",
            **{column: round(value, 1) for column, value in more.items()},
        }
        target = TARGETS.get(case.key) if (mode, name) == ("graph", "step") else None
        row["target"] = target or ""
        self.rows.append(row)
        show(row)


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


# ---- the table

COLUMNS = [
    ("model", "model", "<10"),
    ("tokens", "tokens", "<7"),
    ("queries", "K", ">2"),
    ("mode", "mode", "<5"),
    ("contestant", "contestant", "<13"),
    ("ms", "ms", ">9.3f"),
    ("tokens_per_s", "tok/s", ">9"),
    ("x_bare", "x bare", ">7.3f"),
    ("state_mb", "state", ">8.1f"),
    ("peak_mb", "peak", ">8.1f"),
]


def header() -> str:
    return " ".join(f"{title:{form.partition('.')[0]}}" for _, title, form in COLUMNS)


def show(row: dict[str, Any]) -> None:
    cells = []
    for name, _, form in COLUMNS:
        value = row.get(name, "")
        cells.append(f"{value:{form if value != '' else form.partition('.')[0]}}")
    verdict = ""
    if row["target"]:
        met = "met" if row["x_bare"] <= row["target"] else "MISSED"
        verdict = f"  target {row['target']:.2f} {met}"
    print(" ".join(cells) + verdict, flush=True)


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
            if not some:
                continue
            if options.host:
                rows += attempt(f"{name} host", lambda name=name: host_rows(name, options)) or []
            model = attempt(name, lambda name=name: make(name, options))
            print(header() if model is not None else f"{name}: left out")
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
    add("--tokens", nargs="+", type=Tokens.parse, metavar="16x32", help="examples x length")
    add("--queries", nargs="+", type=int, help="K of a two-sided step: 2 K groups")
    add("--rank", type=int)
    add("--layers", type=int, help="so many layers of the model only")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--padded", action="store_true", help="pad the first example, and pass a mask")
    add("--no-host", dest="host", action="store_false", help="leave the host's time out")
    add("--repeats", type=int, default=5, help="measurements, of which the median is taken")
    add("--least-ms", type=float, default=150.0, help="a measurement lasts so long or longer")
    add("--profile", action="store_true", help="a table of kernels: captured step against bare")
    add("--output", type=Path, help="CSV; default benchmarks/results/step_GPU[_quick].csv")
    add("--device", default="cuda", help="cpu: whether the script works")
    options = parser.parse_args(arguments)
    if options.output is None:
        gpu = machine()["gpu"].lower().replace("nvidia", "").split()[0]
        part = options.model or options.tokens or options.queries or options.layers
        kind = "_part" if part else "_quick" if options.quick else ""
        options.output = RESULTS / f"step_{gpu}{kind}.csv"
    return options


def main(arguments: list[str]) -> None:
    torch.set_grad_enabled(False)
    run(parse(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
