"""Rules that give a learning rate for every budget, held against the rates that dev chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from study import BUDGETS, SELECTION_SEED, TASKS

Record = dict[str, Any]
# lr = c / steps^p: one rate for all lengths, or one that falls with the root of the length
POWERS = {"one rate": 0.0, "c / sqrt(steps)": 0.5}
NEAR = 1.3  # a run counts for a rule whose rate is its own within this factor


def rule_table(records: Sequence[Record], methods: Sequence[str]) -> list[list[str]]:
    """For each task, method and rule: the best c, and what it loses at each budget, header first.

    Losses are of dev, one seed: points of accuracy, for language modelling nats a token.
    """
    table = [["task", "method", *(f"{name}: c; loses" for name in POWERS)]]
    for task in TASKS:
        for method in methods:
            lost = regrets(records, task, method)
            told = [_told(best_constant(lost, power), task) for power in POWERS.values()]
            if set(told) != {"-"}:
                table.append([task, method, *told])
    return table


def regrets(
    records: Sequence[Record], task: str, method: str
) -> list[dict[tuple[int, float], float]]:
    """For each budget: (steps, rate) -> what the rate loses on dev against the best selection run.

    Runs of one rate with different other options count as the better of them.
    """
    found = []
    for budget in BUDGETS:
        runs = [
            r
            for r in records
            if (r["task"], r["method"], r["budget"], r["seed"])
            == (task, method, budget, SELECTION_SEED)
            and not r["test"]
        ]
        bad = [r["dev_loss"] if task == "reviews" else -r["dev_accuracy"] for r in runs]
        lost: dict[tuple[int, float], float] = {}
        for r, value in zip(runs, bad, strict=True):
            at = (r["steps"], r["choice"]["lr"])
            lost[at] = min(lost.get(at, math.inf), value - min(bad))
        found.append(lost)
    return found


def best_constant(
    lost: Sequence[dict[tuple[int, float], float]], power: float
) -> tuple[float, list[float]] | None:
    """The c of lr = c / steps^power that loses least in all, and its loss at each budget.

    None where no c has a run near its rate at every budget.
    """
    constants = {rate * steps**power for runs in lost for steps, rate in runs}
    scored = []
    for c in sorted(constants):
        losses = []
        for runs in lost:
            off = {at: abs(math.log(at[1] * at[0] ** power / c)) for at in runs}
            nearest = min(off, key=lambda at: off[at], default=None)
            if nearest is not None and off[nearest] <= math.log(NEAR):
                losses.append(runs[nearest])
        if len(losses) == len(lost):
            scored.append((sum(losses), c, losses))
    if not scored:
        return None
    _, c, losses = min(scored)
    return c, losses


def _told(rule: tuple[float, list[float]] | None, task: str) -> str:
    if rule is None:
        return "-"
    c, losses = rule
    if task == "reviews":
        return f"{c:.2g}; {', '.join(f'{x:.3f}' for x in losses)}"
    return f"{c:.2g}; {', '.join(f'{100 * x:.1f}' for x in losses)}"
