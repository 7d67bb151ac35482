"""A step with noise in the activations against the plain forward, captured and not.

    python benchmarks/bench_activation_step.py                                # what has a target
    python benchmarks/bench_activation_step.py --quick                        # but whole groups
    python benchmarks/bench_activation_step.py --tokens 16x32 --queries 8 --form core --profile
    python benchmarks/bench_activation_step.py --model OPT-1.3B --tokens 16x32 --queries 8

Models have random bf16 weights in the shapes of OPT-13B, OPT-1.3B and Llama-3-8B. The weights that
write to the residual stream in the later half of the blocks are trained with block credit, rank 64
(24 at OPT-1.3B) and rule muon; the loss reads two label words at the last position. What a step
holds: the clean forward, K queries, the update of all matrices with its Newton-Schulz steps.
    where "loss"   a query is one decoded row of each example, against one clean forward
    where "all"    noise at every token: K + 1 groups in one forward, against a plain forward of
                   as many tokens in which the lower half of the blocks runs on one group as well

Correctness comes first: on small fp32 models, decoded rows give the differences of the losses that
whole groups give. Then, for each case and form, the uncaptured step and the captured one
(SubZero.capture), which must give the same loss, weights and momentum bit for bit and leave the
checksum of the model's weights as it was. A line of the table is one contestant:
    ms, x bare    of the device, the median; over the plain forward in the same mode
    host ms       until the call returns
    state         MB allocated for as long as the optimizer lives
    peak          MB at most, state included, beyond what the plain forward takes at most; of which
    cache         MB are keys and values of the noisy blocks, and 3 % of the weights may be the rest
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from gpu_bench import (
    Call,
    attempt,
    header,
    line,
    machine,
    peak_bytes,
    release_memory,
    write_csv,
)
from model_shapes import RANKS
from step_checks import SIZE, SMALL, checksum, same_bits
from step_models import CONFIGS, LABEL_WORDS, Tokens, build, make_batch, plain_losses
from step_options import DTYPES, add_options, output_of
from step_profile import compare_kernels
from step_time import Timer, allocated, graphed, host_ms
from torch import Tensor, nn

from subzero import SubZero, label_words
from subzero.credit import RESIDUAL_WRITERS, blocks_in_order
from subzero.groups import SharedPrefix, repeat_batch
from subzero.hooks import Hooks

EPS, LR = 3e-2, 1e-3

# A captured step over the bare forward as a graph, by model, where, tokens and queries.
TARGETS = {
    ("OPT-13B", "loss", "16x256", 32): 1.25,
    ("OPT-13B", "loss", "16x32", 8): 1.35,
    ("OPT-13B", "all", "4x2048", 4): 1.06,
}
WEIGHTS_SHARE = 0.03  # of the weights' bytes, that a step may take beside the cache
SMALL_TOLERANCE = 1e-3  # of the differences' norm, in fp32


class Case(NamedTuple):
    model: str
    where: str
    tokens: Tokens
    queries: int
    form: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.model, self.where, str(self.tokens), self.queries

    def __str__(self) -> str:
        return f"{self.model} {self.where} {self.tokens} K={self.queries} {self.form}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Those with a target, or the ones asked for."""
    for model in options.model:
        chosen = [(where, Tokens.parse(t), k) for m, where, t, k in TARGETS if m == "OPT-13B"]
        if options.quick:
            chosen = [some for some in chosen if some[0] == "loss"]
        if options.tokens or options.queries or options.where:
            chosen = [
                (where, tokens, queries)
                for where in options.where or ["loss"]
                for tokens in options.tokens or [Tokens(16, 32)]
                for queries in options.queries or [8]
            ]
        for some in chosen:
            for form in options.form:
                yield Case(model, *some, form)


def train_later_half(model: nn.Module) -> None:
    """Only weights that write to the residual stream, in the later half of the blocks."""
    model.requires_grad_(False)
    found = blocks_in_order(model)
    assert found is not None
    for block in found[1][len(found[1]) // 2 :]:
        for name, module in block.named_modules():
            if name.rpartition(".")[2] in RESIDUAL_WRITERS:
                module.weight.requires_grad_(True)


def optimizer(model: nn.Module, case: Case, rank: int) -> SubZero:
    return SubZero(
        model, lr=LR, eps=EPS, rank=rank, queries=case.queries, rule="muon", noise="activation",
        form=case.form, credit="block", where=case.where,
    )  # fmt: skip


# ---- correctness


def check_small_models(device: str) -> None:
    """Differences of the losses in fp32, by decoded rows and by whole groups.

    Raises:
        AssertionError: they differ by more than rounding, or rows do not serve.
    """
    for name, config in SMALL.items():
        model = build(config, device, torch.float32)
        train_later_half(model)
        batch = make_batch(Tokens(5, 8), SIZE["vocab_size"], device, padded=True)
        objective, found = label_words(LABEL_WORDS), []
        for whole in (False, True):
            opt = optimizer(model, Case(name, "loss", Tokens(5, 8), 6, "right"), 8)
            if whole:
                opt.evaluate_whole_groups("to compare")
            micros = opt._queries.bind(batch, objective, None)
            opt._queries.evaluate(micros, objective, 1e-1, opt._rng)
            assert opt._queries.decodes != whole, opt.plan().whole_groups
            found.append(micros[0].differences)
            opt.detach()
        error = float((found[0] - found[1]).norm() / found[1].norm())
        assert error <= SMALL_TOLERANCE, f"{name}: rows differ from whole groups by {error:.1e}"
        print(f"small {name}, fp32: rows differ from whole groups by {error:.1e}")


def values_of(opt: SubZero) -> list[Tensor]:
    """What a step changes: the state of all matrices, and the momentum."""
    return [opt._weights.space.value, *opt._rule_state["core"].values()]


# ---- one case


class Bench:
    """Measures the contestants of one case; ``rows`` grows as they are done."""

    def __init__(self, case: Case, model: nn.Module, options: argparse.Namespace) -> None:
        self.case, self.model, self.options = case, model, options
        vocabulary = model.config.vocab_size
        self.batch = make_batch(case.tokens, vocabulary, options.device, options.padded)
        self.warm = make_batch(Tokens(16, 32), vocabulary, options.device, False)
        self.objective = label_words(LABEL_WORDS)
        self.rank = options.rank or min(RANKS[case.model], model.config.hidden_size // 2)
        self.groups = 1 if case.where == "loss" else case.queries + 1
        self.timer = Timer(options.device, options.repeats, options.least_ms)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        bare, hooks = self.bare(), Hooks(lambda memo: None)
        if self.groups > 1:  # the lower blocks run once, as they do in a step
            noisy = {id(p) for p in self.model.parameters() if p.requires_grad}
            shared = SharedPrefix(self.model, noisy, hooks)
            shared.groups, shared.rows = self.groups, self.groups * self.case.tokens.examples
        try:
            eager = self.timer.ms({"bare": bare})["bare"]
            least = peak_bytes(bare)
            graph = graphed(bare, self.options.device)
        finally:
            hooks.remove()
        self.add("eager", "bare", eager)
        self.step(graph, eager, least)

    def bare(self) -> Call:
        batch = repeat_batch(self.batch, self.groups)
        return lambda: plain_losses(self.model, batch)

    def step(self, bare: Call, eager_ms: float, least: int) -> None:
        before = allocated()
        opt = optimizer(self.model, self.case, self.rank)
        try:
            opt.bases_from(self.warm, self.objective)
            self.ours(opt, bare, eager_ms, least, before)
        finally:
            opt.detach()  # folds: the next case trains on

    def ours(self, opt: SubZero, bare: Call, eager_ms: float, least: int, before: int) -> None:
        options, case = self.options, self.case

        def step() -> Tensor:
            return opt.step(self.batch, self.objective)

        step()  # compiles kernels, allocates what stays
        state = allocated() - before
        peak, cache = state + peak_bytes(step) - least, self.cache_bytes()
        ms, host = self.timer.ms({"": step})[""], host_ms(step, options.device, 5)
        self.add("eager", "step", ms, eager_ms, host_ms=host)
        run = opt.capture(self.batch, self.objective)

        def replay() -> Tensor:
            return run(self.batch)

        self.check(opt, step, replay)
        times = self.timer.ms({"bare": bare, "step": replay})
        self.add("graph", "bare", times["bare"])
        self.add(
            "graph", "step", times["step"], times["bare"],
            host_ms=host_ms(replay, options.device, 5),
            state_mb=state / 1e6, peak_mb=peak / 1e6, cache_mb=cache / 1e6,
        )  # fmt: skip
        share = (peak - cache) / sum(p.numel() * p.element_size() for p in self.model.parameters())
        met = "met" if share <= WEIGHTS_SHARE else "MISSED"
        print(f"{case}: {share:.2%} of the weights beside the cache, target 3 % {met}")
        print(f"{case}: {opt.plan().summary().splitlines()[2]}")
        if options.profile:
            compare_kernels(bare, replay, options.device)

    def cache_bytes(self) -> int:
        """Keys and values of the noisy blocks, which queries that cost a row attend to."""
        if self.case.where == "all":
            return 0
        config, (examples, length) = self.model.config, self.case.tokens
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (config.hidden_size // config.num_attention_heads)
        blocks = config.num_hidden_layers - config.num_hidden_layers // 2
        return 2 * blocks * examples * length * width * DTYPES[self.options.dtype].itemsize

    def check(self, opt: SubZero, step: Call, replay: Call) -> None:
        """The same step twice, from the same values and draw; the weights are only read."""
        start, draws, found = [v.clone() for v in values_of(opt)], opt.draws, []
        before = checksum(self.model)
        for call in (step, replay):
            for value, held in zip(values_of(opt), start, strict=True):
                value.copy_(held)
            opt.draws = draws
            found.append((call().clone(), *(value.clone() for value in values_of(opt))))
        same = all(same_bits(a, b) for a, b in zip(*found, strict=True))
        moved = not same_bits(found[0][1], start[0])
        print(f"{self.case}: captured {'equals' if same and moved else 'DIFFERS FROM'} uncaptured")
        same = checksum(self.model) == before
        print(f"{self.case}: weights {'unchanged' if same else 'CHANGED'} within the window")

    def add(self, mode: str, name: str, ms: float, bare: float | None = None, **more: Any) -> None:
        case = self.case
        row: dict[str, Any] = {
            "model": case.model,
            "layers": self.model.config.num_hidden_layers,
            "where": case.where,
            "tokens": str(case.tokens),
            "queries": case.queries,
            "form": case.form,
            "rank": self.rank,
            "mode": mode,
            "contestant": name,
            "ms": round(ms, 3),
            "x_bare": round(ms / bare, 4) if bare else "",
            "host_ms": "",
            "state_mb": "",
            "peak_mb": "",
            "cache_mb": "",
            **{column: round(value, 3) for column, value in more.items()},
        }
        row["target"] = TARGETS.get(case.key, "") if (mode, name) == ("graph", "step") else ""
        self.rows.append(row)
        show(row)


# ---- the table

COLUMNS = [
    ("model", "model", "<10"),
    ("where", "where", "<5"),
    ("tokens", "tokens", "<7"),
    ("queries", "K", ">3"),
    ("form", "form", "<5"),
    ("mode", "mode", "<5"),
    ("contestant", "contest", "<7"),
    ("ms", "ms", ">9.3f"),
    ("x_bare", "x bare", ">7.3f"),
    ("host_ms", "host ms", ">8.2f"),
    ("state_mb", "state", ">8.1f"),
    ("peak_mb", "peak", ">8.1f"),
    ("cache_mb", "cache", ">8.1f"),
]


def show(row: dict[str, Any]) -> None:
    verdict = ""
    if row["target"]:
        met = "met" if row["x_bare"] <= row["target"] else "MISSED"
        verdict = f"  target {row['target']:.2f} {met}"
    print(line(row, COLUMNS) + verdict, flush=True)


# ---- the run


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    begun, where = time.perf_counter(), machine()
    print(f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}")
    rows: list[dict[str, Any]] = []
    attempt("small models", lambda: check_small_models(options.device))
    try:
        for name in options.model:
            model = attempt(name, lambda name=name: make(name, options))
            if model is None:
                continue
            print(header(COLUMNS))
            for case in cases(options):
                if case.model != name:
                    continue
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
    config = CONFIGS[name]
    if options.layers:
        config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": options.layers})
    model = build(config, options.device, DTYPES[options.dtype])
    train_later_half(model)
    return model


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=CONFIGS, default=["OPT-13B"])
    add("--quick", action="store_true", help="leave out whole groups, whose steps take a second")
    add("--where", nargs="+", choices=["loss", "all"])
    add("--queries", nargs="+", type=int, help="K")
    add("--form", nargs="+", choices=["core", "right"], default=["right", "core"])
    add_options(parser)
    options = parser.parse_args(arguments)
    part = options.layers or options.tokens or options.queries or options.where
    options.output = output_of(options, "activation_step", part)
    return options


def main(arguments: list[str]) -> None:
    torch.set_grad_enabled(False)
    run(parse(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
