"""benchmarks/choose_backends.py: from the benchmarks' tables to the default backend of an op."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from subzero_kernels import backends

ROOT = Path(__file__).parents[1]
PAGE = "# Page\n<!-- table backends -->\nstale\n<!-- end -->\nthe rest\n"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import choose_backends

    yield choose_backends
    del sys.modules["choose_backends"]


def write(path: Path, *cases: tuple[str, str, str, dict[str, float]], **where: str) -> Path:
    """A table as the benchmarks write it, of (op, kind, what, us by contestant)."""
    where = {"gpu": "GPU", "torch": "2.0", "triton": "3.0", "date": "2026-01-02"} | where
    rows = [
        dict(op=op, what=what, dtype="bf16", kind=kind, contestant=name, us=us, **where)
        for op, kind, what, times in cases
        for name, us in times.items()
    ]
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def made(script, folder: Path, *tables: Path) -> tuple[dict, str]:
    page, output = folder / "page.md", folder / "choices.json"
    page.write_text(PAGE)
    script.main([*map(str, tables), "--output", str(output), "--page", str(page)])
    return json.loads(output.read_text()), page.read_text()


KIND = "bfloat16 large rank 64"


def test_the_tables_become_the_default_of_each_op(script, tmp_path, monkeypatch):
    both = {"cuda": 10.0, "triton": 10.0, "eager": 1.0}
    perturb = write(
        tmp_path / "perturb.csv",
        ("perturb_", KIND, "1x1", both | {"triton": 5.0}),
        ("perturb_", KIND, "2x2", both | {"triton": 8.0}),
        ("fold_", KIND, "a model", both | {"triton": 9.8}),
        ("perturb_many_", KIND, "a model", {"cuda": 10.0, "eager": 1.0}),  # triton failed
    )
    rng = write(tmp_path / "rng.csv", ("normal_", "float32 large", "x", both | {"cuda": 8.0}))
    choices, page = made(script, tmp_path, perturb, rng)
    assert choices == {
        "on": "GPU, torch 2.0, triton 3.0, 2026-01-02",
        "triton_speed": {
            "fold_": {KIND: 1.02},
            "normal_": {"float32 large": 0.8},
            "perturb_": {KIND: 1.581},  # the geometric mean of 2 and 1.25
        },
    }
    assert page.startswith("# Page\n") and page.endswith("<!-- end -->\nthe rest\n")
    assert "stale" not in page
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for op, kind in (("fold_", KIND), ("normal_", "float32 large"), ("perturb_", KIND)):
        monkeypatch.setattr(backends, "measured", lambda: choices)
        first = backends._candidates(op, "cuda", kind)[0][0]
        assert lines[op].split(" | ")[2] == first == ("triton" if op == "perturb_" else "cuda")


def test_a_case_measured_again_counts_once_as_measured_last(script, tmp_path):
    case = "perturb_", KIND, "1x1"
    quick = write(tmp_path / "quick.csv", (*case, {"cuda": 10.0, "triton": 5.0}))
    full = write(tmp_path / "full.csv", (*case, {"cuda": 10.0, "triton": 20.0}))
    assert made(script, tmp_path, quick, full)[0]["triton_speed"] == {"perturb_": {KIND: 0.5}}


@pytest.mark.parametrize("fault", ["two GPUs", "no kind", "no marks"])
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(script, tmp_path, fault):
    case = "perturb_", KIND, "1x1", {"cuda": 10.0, "triton": 5.0}
    tables = [write(tmp_path / "a.csv", case)]
    page, output = tmp_path / "page.md", tmp_path / "choices.json"
    page.write_text("" if fault == "no marks" else PAGE)
    message = "expected <!-- table backends -->"
    if fault == "two GPUs":
        tables.append(write(tmp_path / "b.csv", case, gpu="another"))
        message = r"from one GPU, got \['GPU', 'another'\]"
    elif fault == "no kind":
        tables[0].write_text(tables[0].read_text().replace("kind", "sort"))
        message = "got one without kind; measure again"
    with pytest.raises(ValueError, match=message):
        script.main([*map(str, tables), "--output", str(output), "--page", str(page)])
    assert not output.exists() and page.read_text() in ("", PAGE)


def test_the_committed_page_shows_the_committed_choices(script):
    page, choices = script.PAGE.read_text(encoding="utf-8"), backends.measured()
    if choices["triton_speed"]:
        assert script.replaced(page, script.table(choices)) == page
    else:
        assert "Not measured yet: `cuda` runs every kind." in page
