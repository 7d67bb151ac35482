"""The contestants of bench_step on one model and batch: how each is made, checked and timed."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from gpu_bench import Call, attempt, line, peak_bytes, release_memory
from model_shapes import RANKS
from step_baselines import EPS, LR, Composed, addmm_subzero, eager_mezo, eager_subzero
from step_checks import checksum, restart, same_bits, values_of
from step_models import LABEL_WORDS, SST2, Tokens, make_batch, plain_losses, sentences
from step_profile import compare_kernels
from step_time import Timer, allocated, graphed
from torch import Tensor, nn

from subzero import SubZero, label_words
from subzero.batches import pack
from subzero.groups import repeat_batch
from subzero.objectives import MASKED_BY_HAND

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


# Milliseconds of a whole step on 16 sentences.
SST2_MS = {"OPT-13B": 45.0}


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
        row["target_ms"] = ""
        self.rows.append(row)
        show(row)


class Sentences(Bench):
    """16 sentences of mixed lengths: what packing saves."""

    def __init__(self, model_name: str, model: nn.Module, options: argparse.Namespace) -> None:
        super().__init__(Case(model_name, Tokens(len(SST2), max(SST2)), 1), model, options)
        self.batch = sentences(model.config.vocab_size, options.device)

    def run(self) -> None:
        options, count = self.options, len(SST2)
        by_hand = self.model.config.model_type in MASKED_BY_HAND
        length = -(-sum(SST2) // 64) * 64
        packed = pack(self.batch, length, self.model.dtype if by_hand else None)
        graphs = {"bare": graphed(self.bare(), options.device)}
        opt = self.optimizer()
        runs = {
            "step, padded": (self.batch, opt.capture(self.batch, self.objective)),
            "step, packed": (packed, opt.capture(packed, label_words(LABEL_WORDS, packed=count))),
        }
        opt.draws = 0
        start, losses = [value.clone() for value in values_of(opt)], []
        for batch, run in runs.values():  # the same noise, so nearly the same loss
            restart(opt, start, 0)
            losses.append(float(run(batch)))
        print(f"{self.case} sentences: loss padded {losses[0]:.4f}, packed {losses[1]:.4f}")
        for name, (batch, run) in runs.items():
            graphs[name] = lambda batch=batch, run=run: run(batch)
        times = self.timer.ms(graphs)
        for name, ms in times.items():
            self.add("graph", name, ms, times["bare"])
            row = self.rows[-1]
            row["tokens"] = "SST-2"
            row["tokens_per_s"] = round(2 * sum(SST2) / ms * 1e3)  # of real tokens
            if name != "bare" and self.case.model in SST2_MS:
                row["target_ms"] = most = SST2_MS[self.case.model]
                print(f"    {ms:.1f} ms, target {most:.0f} {'met' if ms <= most else 'MISSED'}")
        opt.detach()


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


def show(row: dict[str, Any]) -> None:
    verdict = ""
    if row["target"]:
        met = "met" if row["x_bare"] <= row["target"] else "MISSED"
        verdict = f"  target {row['target']:.2f} {met}"
    print(line(row, COLUMNS) + verdict, flush=True)
