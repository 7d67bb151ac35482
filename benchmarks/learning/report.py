"""Tables and plots of the study, from its CSV files and nothing else.

    python benchmarks/learning/report.py                        # markdown, to read
    python benchmarks/learning/report.py --page docs/recipes.md # and into the page's tables
    python benchmarks/learning/report.py --plots benchmarks/results

A cell shows the runs of the option that dev chose; candidates can be added later, and
runs of an option that dev prefers no more stay in the file and out of the tables.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plots import draw
from rates import rule_table
from scipy import stats
from study import BUDGETS, LONG, SELECTION_SEED, TASKS, best_choice, read

RESULTS = Path(__file__).parents[1] / "results"
STUDY = RESULTS / "learning_study.csv"
SECONDS = RESULTS / "learning_seconds.csv"
EXPLORATION = RESULTS / "learning_exploration.csv"
CLOSERS = RESULTS / "learning_closers.csv"
PRECISION = RESULTS / "learning_precision.csv"

ACTIVATION = ("core-rows", "right-rows", "full-rows", "core-whole", "right-whole", "full-whole")
WEIGHT = ("weight-norm", "weight-muon", "weight-sgd")
FIRST_ORDER = ("adamw", "adamw-lora")
ORDER = (*ACTIVATION, *WEIGHT, "mezo", *FIRST_ORDER)
# Scored examples of the task; a share of correct ones has a sampling error of its own.
TEST_EXAMPLES = {"sst2": 1821, "rte": 277}

Record = dict[str, Any]
Choice = dict[str, Any]
Table = list[list[str]]  # the header first


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        choice: what dev chose among the selection runs.
        rates: every learning rate of those, ascending, whatever else they change.
        scores: test accuracy, or loss for language modelling, one a seed.
        steps: of each of the runs scored.
    """

    choice: Choice
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    steps: tuple[int, ...]

    @property
    def edge(self) -> str:
        """Where the chosen rate lies among those tried: "", "lowest", "highest" or "only"."""
        if len(self.rates) < 2:
            return "only"
        # at 10,000 the choice is 2,000's with another rate: no selection, so no edge
        ends = {self.rates[0]: "lowest", self.rates[-1]: "highest"}
        return ends.get(self.choice["lr"], "")


def metric(task: str) -> str:
    """What is reported of a task."""
    return "test_loss" if task == "reviews" else "test_accuracy"


def cell(records: list[Record], task: str, method: str, budget: int) -> Cell | None:
    """None where no selection run is there."""
    at = min(budget, max(BUDGETS))
    chosen = best_choice(records, task, method, at, 1)
    if chosen is None:
        return None
    here = [r for r in records if (r["task"], r["method"]) == (task, method)]
    selection = [r for r in here if (r["budget"], r["seed"]) == (at, SELECTION_SEED)]
    rates = tuple(sorted({r["choice"]["lr"] for r in selection if not r["test"]}))
    if budget > at:
        chosen = chosen | {"lr": chosen["lr"] / 5**0.5}
    runs = [r for r in here if r["test"] and r["budget"] == budget and r["choice"] == chosen]
    runs.sort(key=lambda r: r["seed"])
    scores = tuple(r[metric(task)] for r in runs)
    return Cell(chosen, rates, scores, tuple(r["steps"] for r in runs))


def cells(records: list[Record], task: str) -> dict[tuple[str, int], Cell]:
    """By method and budget, in the tables' order; only those with a selection run."""
    found = {}
    for method in ORDER:
        for budget in (*BUDGETS, LONG[0]):
            one = cell(records, task, method, budget)
            if one is not None and (one.scores or budget <= max(BUDGETS)):
                found[method, budget] = one
    return found


def budgets_of(found: dict[tuple[str, int], Cell]) -> list[int]:
    """The budgets with a score."""
    return sorted({budget for (_, budget), one in found.items() if one.scores})


def methods_of(found: dict[tuple[str, int], Cell]) -> list[str]:
    """The methods with a score."""
    return [m for m in ORDER if any(name == m and one.scores for (name, _), one in found.items())]


def spread(scores: Sequence[float]) -> str:
    """Mean, standard deviation and number of runs."""
    if not scores:
        return "-"
    deviation = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.4f}{deviation} ({len(scores)})"


def options(choice: Choice) -> str:
    """An option as text, the learning rate first."""
    rest = sorted(name for name in choice if name != "lr")
    return ", ".join([f"lr {choice['lr']:g}", *(f"{name} {choice[name]}" for name in rest)])


def score_table(found: dict[tuple[str, int], Cell]) -> Table:
    """Test scores: a line for each method, a column for each budget."""
    budgets = budgets_of(found)
    rows = [["method", *(f"{budget:,} forwards" for budget in budgets)]]
    for method in methods_of(found):
        here = [found.get((method, budget)) for budget in budgets]
        rows.append([method, *(spread(one.scores if one else ()) for one in here)])
    return rows


def choice_table(found: dict[tuple[str, int], Cell]) -> Table:
    """What dev chose, and where the rate lies among those tried."""
    budgets = [budget for budget in budgets_of(found) if budget <= max(BUDGETS)]
    rows = [["method", *(f"{budget:,} forwards" for budget in budgets)]]
    for method in methods_of(found):
        row = [method]
        for budget in budgets:
            one = found.get((method, budget))
            note = f" ({one.edge} of {len(one.rates)})" if one and one.edge else ""
            row.append(f"{options(one.choice)}{note}".replace("only of 1", "only") if one else "-")
        rows.append(row)
    return rows


def weight_rival(records: list[Record], task: str, budget: int) -> str | None:
    """The weight-noise method that dev prefers at this budget."""
    runs = [
        r
        for r in records
        if (r["task"], r["budget"], r["seed"]) == (task, budget, SELECTION_SEED)
        and r["method"] in WEIGHT
    ]
    if not runs:
        return None
    return max(runs, key=lambda r: (r["dev_accuracy"], -r["dev_loss"]))["method"]


def difference(ours: Cell | None, theirs: Cell | None) -> str:
    """Mean difference over seeds, Welch's 95 % interval and p, two-sided."""
    if ours is None or theirs is None or min(len(ours.scores), len(theirs.scores)) < 2:
        return "-"
    test = stats.ttest_ind(ours.scores, theirs.scores, equal_var=False)
    low, high = test.confidence_interval(0.95)
    mean = statistics.mean(ours.scores) - statistics.mean(theirs.scores)
    p = f"p = {test.pvalue:.3f}" if test.pvalue >= 0.001 else f"p = {test.pvalue:.0e}"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}], {p}"


def difference_table(records: list[Record], task: str) -> Table:
    """Each activation-noise method against MeZO, weight noise and AdamW."""
    found = cells(records, task)
    rows = [["forwards", "method", "minus mezo", "minus weight noise", "minus adamw"]]
    for budget in budgets_of(found):
        weight = weight_rival(records, task, min(budget, max(BUDGETS)))
        for method in ACTIVATION:
            ours = found.get((method, budget))
            rivals = ("mezo", weight or "", "adamw")
            told = [difference(ours, found.get((rival, budget))) for rival in rivals]
            if told[1] != "-":
                told[1] += f" ({weight})"
            if set(told) != {"-"}:
                rows.append([f"{budget:,}", method, *told])
    return rows


def sampling_error(task: str, share: float) -> float:
    """Standard error of an accuracy that comes from the size of the test set."""
    return (share * (1 - share) / TEST_EXAMPLES[task]) ** 0.5


def seconds_table(rows: list[dict[str, str]]) -> Table:
    """A step of each method alone on the device, and 300 forwards' worth of such steps."""
    table = [["method", "options", "ms a step", "forwards a step", "s for 300 forwards", "MiB"]]
    by_method = {row["method"]: row for row in rows}
    for method in ORDER:
        if method not in by_method:
            continue
        row = by_method[method]
        choice = ast.literal_eval(row["choice"])
        choice.pop("lr")  # a step takes as long at any rate
        told = ", ".join(f"{name} {value}" for name, value in sorted(choice.items())) or "-"
        ms, cost = float(row["ms"]), float(row["cost"])
        table.append(
            [method, told, f"{ms:.0f}", f"{cost:.2f}", f"{0.3 * ms / cost:.1f}", row["peak_mib"]]
        )
    return table


def precision_table(rows: list[dict[str, str]]) -> Table:
    """Correlation of a 16-bit model's loss differences with fp32's, for each eps."""
    sizes = sorted({float(row["eps"]) for row in rows})
    found = {(row["dtype"], float(row["eps"])): row["correlation"] for row in rows}
    table = [["weights and activations", *(f"eps {eps:g}" for eps in sizes)]]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        table.append([dtype, *(f"{float(found[dtype, eps]):.3f}" for eps in sizes)])
    return table


# Columns of the exploration's table: method, budget and the rate its changes were tried at.
EXPLORED = tuple(
    (method, budget, lr)
    for budget, lr in ((100, 0.01), (300, 0.007), (2000, 0.0015))
    for method in ("right-rows", "full-rows")
)
RANKED = tuple((m, b) for b in (100, 300) for m in ("core-rows", "right-rows"))


def explored(path: Path) -> list[Record]:
    """Records of the exploration; right's own rank is no change."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = []
    for row in rows:
        record: Record = {"method": row["method"], "budget": int(row["budget"])}
        record["changes"] = json.loads(row["changes"])
        if row["method"] == "right-rows" and record["changes"] == {"rank": 32}:
            record["changes"] = {}
        record |= {name: float(row[name]) for name in ("lr", "dev_accuracy", "dev_loss")}
        records.append(record)
    return records


def tried(records: list[Record], method: str, budget: int, lr: float, changes: Choice) -> str:
    """Dev accuracy and loss of these runs, means over seeds."""
    wanted = (method, budget, lr, changes)
    names = ("method", "budget", "lr", "changes")
    runs = [r for r in records if tuple(r[n] for n in names) == wanted]
    if not runs:
        return "-"
    accuracy, loss = (statistics.mean(r[n] for r in runs) for n in ("dev_accuracy", "dev_loss"))
    return f"{accuracy:.3f} / {loss:.2f}"


def exploration_table(records: list[Record]) -> Table:
    """Learning rates with nothing changed, then one change at a time."""
    rows = [["changed", *(f"{method}, {budget:,}" for method, budget, _ in EXPLORED)]]

    def add(label: str, changes: Choice, at: float | None) -> None:
        told = [tried(records, m, b, at or lr, changes) for m, b, lr in EXPLORED]
        if set(told) != {"-"}:
            rows.append([label, *told])

    for lr in (0.0007, 0.0015, 0.003, 0.005, 0.01, 0.02):
        add(f"lr {lr:g}", {}, lr)
    kinds = {json.dumps(r["changes"]) for r in records}
    for change in sorted((json.loads(kind) for kind in kinds), key=_by_name):
        if change.get("rule") == "norm":
            for lr in (0.1, 0.3, 1.0):
                add(f"rule norm, lr {lr:g}", change, lr)
        elif change and "rank" not in change:
            add(", ".join(f"{name} {value}" for name, value in change.items()), change, None)
    return rows


def rank_table(records: list[Record]) -> Table:
    """The forms' ranks, at each learning rate."""
    rows = [["rank", "lr", *(f"{method}, {budget}" for method, budget in RANKED)]]
    for rank in (16, 32, 64):
        for lr in (0.005, 0.01, 0.02):
            told = []
            for method, budget in RANKED:
                plain = method == "right-rows" and rank == 32
                change = {} if plain else {"rank": rank}
                told.append(tried(records, method, budget, lr, change))
            rows.append([str(rank), f"{lr:g}", *told])
    return rows


def closer_table(tried_runs: list[Record], study: list[Record]) -> Table:
    """What was tried against AdamW's lead: dev accuracy and loss of each seed, best checkpoint.

    The study's selection runs of the same method and budget stand beside them.
    """
    table = [["method", "forwards", "options", "dev accuracy / loss, by seed"]]
    cells = {(r["method"], r["budget"]) for r in tried_runs}
    at = ("task", "method", "budget")
    for method, budget in sorted(cells, key=lambda c: (c[1], c[0])):
        chosen = [
            r
            for r in [*study, *tried_runs]
            if [r[n] for n in at] == ["sst2", method, budget] and not r["test"]
        ]
        by_options: dict[str, dict[int, str]] = {}
        for r in chosen:
            told = f"{r['dev_accuracy']:.3f} / {r['dev_loss']:.2f}"
            by_options.setdefault(options(r["choice"]), {})[r["seed"]] = told
        for name, seeds in sorted(by_options.items()):
            told = ", ".join(text for _, text in sorted(seeds.items()))
            table.append([method, f"{budget:,}", name, told])
    return table


def _by_name(change: Choice) -> list[tuple[str, float, str]]:
    """Numbers in order of size, 8 before 16."""
    return [
        (name, value if isinstance(value, (int, float)) else 0.0, str(value))
        for name, value in sorted(change.items())
    ]


def tables() -> Iterator[tuple[str, Table]]:
    """Every table with a row, by the name that a page uses for it."""
    records = read(STUDY)
    for task in TASKS:
        found = cells(records, task)
        if budgets_of(found):
            yield f"{task} scores", score_table(found)
            yield f"{task} choices", choice_table(found)
            yield f"{task} differences", difference_table(records, task)
    with open(SECONDS, newline="", encoding="utf-8") as file:
        yield "seconds", seconds_table(list(csv.DictReader(file)))
    with open(PRECISION, newline="", encoding="utf-8") as file:
        yield "precision", precision_table(list(csv.DictReader(file)))
    runs = explored(EXPLORATION)
    yield "exploration", exploration_table(runs)
    yield "ranks", rank_table(runs)
    yield "closers", closer_table(read(CLOSERS), records)
    yield "rates", rule_table(records, ORDER)


def markdown(table: Table) -> str:
    """Pipes and a rule below the header."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str, made: dict[str, Table]) -> str:
    """The page with what lies between <!-- table NAME --> and <!-- end --> made anew."""

    def put(match: re.Match[str]) -> str:
        return f"{match[1]}\n{markdown(made[match[2]])}\n{match[3]}"

    return re.sub(r"(<!-- table (.+?) -->)\n.*?(<!-- end -->)", put, page, flags=re.DOTALL)


def main() -> None:
    """Print every table; fill a page, draw plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="markdown file whose tables are made anew")
    parser.add_argument("--plots", type=Path, help="folder for learning_TASK.png")
    args = parser.parse_args()
    made = dict(tables())
    for name, table in made.items():
        print(f"## {name}\n\n{markdown(table)}\n")
    records = read(STUDY)
    for task in TEST_EXAMPLES:
        for (method, budget), one in cells(records, task).items():
            if method == "adamw" and one.scores:
                error = sampling_error(task, statistics.mean(one.scores))
                print(f"{task}, {budget:,}: adamw's standard error from test size {error:.4f}")
    if args.page:
        args.page.write_text(fill(args.page.read_text(encoding="utf-8"), made), encoding="utf-8")
    if args.plots:
        for task in TASKS:
            path = args.plots / f"learning_{task}.png"
            found = cells(records, task)
            drawn = len(budgets_of(found)) > 1  # a curve needs two points
            if drawn:
                draw(found, methods_of(found), budgets_of(found), task, path)
            print(path if drawn else f"{task}: too few budgets for a plot")


if __name__ == "__main__":
    main()
