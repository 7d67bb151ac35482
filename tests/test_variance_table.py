"""Variance of activation noise: formula, simulation, CSV and docs/activation-noise.md agree."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "learning" / "variance.py"
PAGE = ROOT / "docs" / "activation-noise.md"
CSV = ROOT / "benchmarks" / "results" / "activation_variance.csv"


@pytest.fixture(scope="module")
def variance() -> Iterator[ModuleType]:
    """The script as a module; benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location("variance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["variance"] = module  # annotations of its classes are looked up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["variance"]


@pytest.fixture(scope="module")
def small(variance):
    """Sizes other than the page's, m > n instead of m < n, and a seed that keeps all V apart."""
    setting = variance.Setting(m=9, n=6, examples=4, queries=3, rows=2, repeats=4000, seed=5)
    return setting, variance.table(setting)


def csv_rows() -> list[dict[str, str]]:
    with open(CSV, newline="") as file:
        return list(csv.DictReader(file))


def page_rows(header: list[str]) -> list[list[str]]:
    """The cells under the page's table with this header."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = cells.index(header) + 2  # the line after the header is |---|
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return cells[start:end]


def test_simulation_meets_formula(small):
    """Within four standard errors: V, cosine, and the mean's component along G, which is 1."""
    for row in small[1]:
        assert abs(row.variance_simulated - row.variance) <= 4 * row.variance_error, row
        assert abs(row.cosine_simulated - row.cosine) <= 4 * row.cosine_error, row
        assert abs(row.mean_simulated - 1) <= 4 * row.mean_error, row


def test_simulation_tells_the_formulas_apart(small):
    """The test above can fail: no row's simulation meets another row's formula."""
    rows = small[1]
    assert len(rows) == 6
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j:
                away = abs(row.variance_simulated - other.variance)
                assert away > 4 * row.variance_error, (row, other)


def test_one_example_needs_no_batch(variance):
    """B = 1: own and shared noise have the same variance, m n + 1 or m + 1 over K."""
    setting = variance.Setting(m=7, n=4, examples=1, queries=2, rows=1, repeats=1)
    problem = variance.make_problem(setting)
    found = [case.variance(problem, setting) for case in variance.cases(setting)]
    assert found == pytest.approx([14.5, 14.5, 4.0, 4.0, 4.0, 4.0])


def test_csv_holds_the_scripts_setting_and_formulas(variance):
    """The formulas are recomputed; the simulated cells are as the script left them."""
    setting, rows = variance.Setting(), csv_rows()
    problem = variance.make_problem(setting)
    expected = list(variance.cases(setting))
    assert len(rows) == len(expected)
    for row, case in zip(rows, expected, strict=True):
        assert [row["noise"], row["drawn for"], row["one loss for"]] == list(case[:3])
        assert float(row["V"]) == pytest.approx(case.variance(problem, setting), rel=1e-3)
        assert [row[name] for name in setting._fields] == [str(value) for value in setting]
        assert abs(float(row["simulated"]) - float(row["V"])) <= 4 * float(row["s.e."])


def test_page_shows_the_csv(variance):
    """Cell by cell, as text."""
    header = variance.HEADER
    assert page_rows(header) == [[row[name] for name in header] for row in csv_rows()]
