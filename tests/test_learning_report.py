"""The study's files agree: CSV, report, page; and its planner chooses by dev and resumes."""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from subzero.settings import Settings, fill

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "learning"
PAGE = ROOT / "docs" / "recipes.md"
# modules that import each other by name
LOCAL = ("report", "rates", "study", "run", "methods", "experiments", "data")


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    """The script as a module, and those it imports; benchmarks/ is no package."""
    before = {name: sys.modules.pop(name) for name in LOCAL if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("report")
    sys.path.remove(str(FOLDER))
    for name in LOCAL:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def study(report) -> ModuleType:
    return sys.modules["study"]


@pytest.fixture(scope="module")
def methods(report) -> ModuleType:
    return sys.modules["methods"]


@pytest.fixture(scope="module")
def made(report) -> dict[str, list[list[str]]]:
    """Every table, from the CSV files."""
    return dict(report.tables())


def page_tables() -> dict[str, list[list[str]]]:
    """The page's marked tables, without the rule below the header."""
    found = re.findall(
        r"<!-- table (.+?) -->\n(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    parsed = {}
    for name, text in found:
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
        parsed[name] = lines[:1] + lines[2:]
    return parsed


def test_page_shows_what_the_csv_files_say(made):
    assert page_tables() == made


def test_prose_has_no_mean_of_its_own():
    """A number of four digits outside the tables stands in one of them."""
    page = PAGE.read_text(encoding="utf-8")
    marked = re.findall(r"<!-- table .*?<!-- end -->", page, re.DOTALL)
    prose = page
    for part in marked:
        prose = prose.replace(part, "")
    numbers = set(re.findall(r"\b0\.\d{4}\b", prose))
    assert numbers
    # the difference of two means, as the sentence says
    allowed = set(re.findall(r"\b0\.\d{4}\b", "".join(marked))) | {"0.0001"}
    assert numbers <= allowed


def test_recipes_are_what_dev_chose(report, study):
    """The page's first table: rate, queries, mean steps and score of the cell."""
    records = study.read(report.STUDY)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    start = rows.index(["forwards", "form", "K", "lr", "steps", "SST-2 test"]) + 2
    for budget, form, queries, lr, steps, score in rows[start : start + 4]:
        name = f"{form.split(',')[0]}-rows"
        cell = report.cell(records, "sst2", name, int(budget.replace(",", "")))
        assert cell.choice == {"lr": float(lr)} | ({"queries": 64} if queries == "64" else {})
        assert int(steps) == round(sum(cell.steps) / len(cell.steps))
        assert score == report.spread(cell.scores)[:6]


def test_columns_of_the_results(report, study):
    with open(report.STUDY, newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        assert tuple(next(rows)) == study.COLUMNS
        assert {len(row) for row in rows} == {len(study.COLUMNS)}


def test_no_run_is_there_twice_and_selection_never_saw_test(report, study):
    records = study.read(report.STUDY)
    keys = [study.key(r) for r in records]
    assert len(set(keys)) == len(keys)
    for r in records:
        assert r["test"] == any(name.startswith("test_") for name in r)
        assert (r["seed"] == study.SELECTION_SEED) != r["test"]


def test_scored_options_had_a_selection_run(report, study):
    """Nothing was scored on test that had not first run on dev, at the same budget."""
    records = study.read(report.STUDY)
    names = ("task", "method", "budget", "choice")
    selection = [[r[n] for n in names] for r in records if not r["test"]]
    scored = [r for r in records if r["test"] and r["budget"] <= max(study.BUDGETS)]
    assert scored
    for r in scored:
        assert [r[n] for n in names] in selection


def arguments(**changes: Any) -> argparse.Namespace:
    """Of the study's command: one task, one method, one budget."""
    usual = dict(tasks=["sst2"], methods=["full-whole"], budgets=[100], long=[], jobs=None)
    return argparse.Namespace(**(usual | changes))


def record(study: ModuleType, choice: dict, dev: float, **changes: Any) -> dict[str, Any]:
    """A finished selection run with its dev accuracy."""
    usual = dict(
        task="sst2", method="full-whole", budget=100, choice=choice, test=False,
        seed=study.SELECTION_SEED, dev_accuracy=dev, dev_loss=0.5,
    )  # fmt: skip
    return usual | changes


def drain(planner: Any) -> list[dict[str, Any]]:
    """All jobs that can start now."""
    jobs = []
    while (job := planner.next()) is not None:
        jobs.append(job)
    return jobs


def test_planner_chooses_by_dev_only(study, methods):
    """What would be better on test and is worse on dev is not chosen."""
    low, high = methods.METHODS["full-whole"].candidates(100, by_token=False)
    records = [
        record(study, low, 0.80, test_accuracy=0.70),
        record(study, high, 0.79, test_accuracy=0.90),
    ]
    jobs = drain(study.Planner(arguments(), records))
    assert [job["seed"] for job in jobs] == list(study.SEEDS)
    assert all(job["choice"] == low and job["test"] for job in jobs)


def test_dev_loss_decides_ties(study, methods):
    low, high = methods.METHODS["full-whole"].candidates(100, by_token=False)
    records = [record(study, low, 0.8), record(study, high, 0.8, dev_loss=0.4)]
    assert study.best_choice(records, "sst2", "full-whole", 100, 2) == high


def test_planner_scores_nothing_before_every_candidate_has_run(study, methods):
    low, high = methods.METHODS["full-whole"].candidates(100, by_token=False)
    planner = study.Planner(arguments(), [record(study, low, 0.8)])
    jobs = drain(planner)
    assert [(job["choice"], job["test"]) for job in jobs] == [(high, False)]
    planner.finished(record(study, high, 0.9))
    assert [(job["choice"], job["test"]) for job in drain(planner)] == [(high, True)] * 5


def test_planner_resumes_from_a_file(study, methods, tmp_path):
    """A job that a results file holds, written and read again, is not run again."""
    low, high = methods.METHODS["full-whole"].candidates(100, by_token=False)
    records = [record(study, low, 0.80), record(study, high, 0.79)]
    records += [record(study, low, 0.8, seed=s, test=True, test_accuracy=0.7) for s in (0, 3)]
    path = tmp_path / "study.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, study.COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(r | {"choice": study.json.dumps(r["choice"])} for r in records)
    jobs = drain(study.Planner(arguments(), study.read(path)))
    assert [job["seed"] for job in jobs] == [1, 2, 4]


def test_own_cells_choose_on_dev_and_keep_the_time(study, tmp_path):
    """Choices of an earlier run take part; what would not end in time is left."""
    low, high, old = ({"lr": lr} for lr in (0.1, 0.2, 0.3))
    cell = dict(task="sst2", method="full-whole", budget=100, choices=[low, high], seeds=[0, 1])
    path = tmp_path / "jobs.json"
    path.write_text(study.json.dumps([cell | {"expected": 60}]))
    earlier = [record(study, old, 0.7), record(study, {"lr": 0.4}, 0.6)]
    planner = study.Planner(arguments(jobs=path), earlier)
    assert planner.next(left=59) is None
    jobs = drain(planner)
    assert [(job["choice"], job["test"]) for job in jobs] == [(low, False), (high, False)]
    planner.finished(record(study, low, 0.65))
    assert planner.next() is None
    planner.finished(record(study, high, 0.68))
    jobs = drain(planner)
    assert [(job["choice"], job["test"], job["seed"]) for job in jobs] == [
        (old, True, 0),
        (old, True, 1),
    ]


def test_candidates_are_those_of_the_nearest_budget_below(methods):
    spec = methods.Method(
        "mezo", choices={0: [{"lr": 1.0}], 300: [{"lr": 2.0}]}, by_token={200: [{"lr": 3.0}]}
    )
    for budget, lr in ((100, 1.0), (299, 1.0), (300, 2.0), (2000, 2.0)):
        assert spec.candidates(budget, by_token=False) == [{"lr": lr}]
    assert spec.candidates(2000, by_token=True) == [{"lr": 3.0}]
    plain = methods.Method("mezo", choices={0: [{"lr": 1.0}]})
    assert plain.candidates(2000, by_token=True) == [{"lr": 1.0}]


def test_cell_takes_the_choice_of_dev_and_marks_the_edge(report, study):
    """Scores of another option stay out, also where they are better."""
    rates = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]
    records = [record(study, c, dev) for c, dev in zip(rates, (0.7, 0.8, 0.75), strict=True)]
    final = [
        record(study, c, 0.5, seed=seed, test=True, test_accuracy=score, steps=9)
        for c, scores in zip(rates, ((0.9, 0.9), (0.6, 0.7), ()), strict=True)
        for seed, score in enumerate(scores)
    ]
    cell = report.cell(records + final, "sst2", "full-whole", 100)
    assert (cell.choice, cell.scores, cell.edge) == ({"lr": 0.2}, (0.6, 0.7), "")
    assert report.spread(cell.scores) == "0.6500 ± 0.0707 (2)"
    assert report.cell(records[:2], "sst2", "full-whole", 100).edge == "highest"
    assert report.cell(records[1:], "sst2", "full-whole", 100).edge == "lowest"
    assert report.cell(records[:1], "sst2", "full-whole", 100).edge == "only"
    assert report.cell(records, "sst2", "mezo", 100) is None


def test_long_budget_takes_the_choice_of_2000(report, study):
    """At 10,000 forwards no selection ran: the rate of 2,000 by the root of five."""
    records = [record(study, {"lr": 0.2}, 0.8, budget=2000)]
    job = next(iter(study.Planner(arguments(methods=[], long=["full-whole"]), []).ready))
    assert (job["budget"], job["test"]) == (2000, False)
    chosen = {"lr": 0.2 / 5**0.5}
    run = record(study, chosen, 0.8, budget=10000, seed=0, test=True, test_accuracy=0.7, steps=9)
    assert report.cell([*records, run], "sst2", "full-whole", 10000).scores == (0.7,)


def test_welch(report):
    """By hand: means 5 and 3, variances 1 and 4, three runs each."""
    ours = report.Cell({"lr": 1.0}, (1.0,), (4.0, 5.0, 6.0), (1, 1, 1))
    theirs = report.Cell({"lr": 1.0}, (1.0,), (1.0, 3.0, 5.0), (1, 1, 1))
    # t = 2 / sqrt(5 / 3) = 1.549, 2.94 degrees of freedom, quantile 3.218
    assert re.fullmatch(
        r"\+2\.0000 \[-2\.15\d\d, \+6\.15\d\d\], p = 0\.2\d\d", report.difference(ours, theirs)
    )
    one = report.Cell({"lr": 1.0}, (1.0,), (4.0,), (1,))
    assert report.difference(ours, one) == "-"


@pytest.mark.parametrize(
    ("method", "studied"),
    [("activation", "core-whole"), ("weight", "weight-norm"), ("mezo", "mezo"), ("adamw", "adamw")],
)
def test_language_modelling_defaults_are_what_dev_chose(report, study, method, studied):
    """``subzero train --task text`` at the study's lengths; a rate is rounded to one digit."""
    records = study.read(report.STUDY)
    for budget in study.BUDGETS:
        chosen = study.best_choice(records, "reviews", studied, budget, 1)
        at = ("reviews", studied, budget)
        steps = next(r["steps"] for r in records if (r["task"], r["method"], r["budget"]) == at)
        filled = fill(Settings(model="m", output="o", steps=steps), method, labelled=False)
        assert filled.lr == pytest.approx(chosen["lr"], rel=0.25), budget


def test_rule_takes_the_constant_that_loses_least(report):
    rates = sys.modules["rates"]
    falling = [{(100, 4e-2): 0.0, (100, 1e-2): 0.2}, {(400, 2e-2): 0.0, (400, 1e-2): 0.01}]
    c, losses = rates.best_constant(falling, 0.5)
    assert c == pytest.approx(0.4) and losses == [0.0, 0.0]
    c, losses = rates.best_constant(falling, 0.0)
    assert c == 1e-2 and losses == [0.2, 0.01]
    # no run near the rule's rate at one of the budgets: nothing to say
    assert rates.best_constant([{(100, 4e-2): 0.0}, {(400, 1e-3): 0.0}], 0.0) is None
    assert rates.best_constant([{(100, 4e-2): 0.0}, {}], 0.0) is None
