"""Which of cuda and triton runs an op by default: the tables become choices.json and a page.

    python benchmarks/choose_backends.py benchmarks/results/perturb_h200.csv \\
        benchmarks/results/rng_h200.csv

The tables are those of bench_perturb.py and bench_rng.py, all from one GPU; of a case that is in
several of them the last counts. Each case belongs to a kind of call (op, dtype, size, rank: the
column kind). For each kind at which both backends were timed the geometric mean over its cases, of
how many times as fast as cuda triton was, goes to subzero_kernels/backends/choices.json. A case
that one of them failed or got wrong has no time of it and decides nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subzero_kernels.backends import MARGIN

ROOT = Path(__file__).parents[1]
CHOICES = ROOT / "subzero_kernels" / "backends" / "choices.json"
PAGE = ROOT / "docs" / "backends.md"
MARKS = "<!-- table backends -->", "<!-- end -->"
PAIR = "cuda", "triton"

Row = Mapping[str, str]


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of both backends in all tables.

    Raises:
        ValueError: a table is not one of these, or they come from different GPUs.
    """
    rows: list[Row] = []
    for path in paths:
        with open(path, newline="") as file:
            table = csv.DictReader(file)
            missing = {"op", "what", "dtype", "kind", "contestant", "us", "gpu"}
            missing -= set(table.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{path}: expected a table of bench_perturb.py or bench_rng.py, got one "
                    f"without {', '.join(sorted(missing))}; measure again"
                )
            rows += [row for row in table if row["contestant"] in PAIR]
    gpus = sorted({row["gpu"] for row in rows})
    if len(gpus) != 1:
        raise ValueError(
            f"tables: expected rows of cuda and triton from one GPU, got {gpus}; "
            "pass the tables of one machine"
        )
    return rows


def speeds(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By op and kind, how many times as fast as cuda triton is."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = row["op"], row["kind"], row["what"], row["dtype"], row.get("rank", "")
        times.setdefault(case, {})[row["contestant"]] = float(row["us"])
    logs: dict[tuple[str, str], list[float]] = {}
    for (op, kind, *_), us in times.items():
        if len(us) == len(PAIR):
            logs.setdefault((op, kind), []).append(math.log(us["cuda"] / us["triton"]))
    found: dict[str, dict[str, float]] = {}
    for (op, kind), values in sorted(logs.items()):
        found.setdefault(op, {})[kind] = round(math.exp(sum(values) / len(values)), 3)
    return found


def choices(rows: Sequence[Row]) -> dict[str, Any]:
    """What choices.json holds."""
    last = rows[-1]
    versions = [f"{name} {last[name]}" for name in ("torch", "triton") if last.get(name)]
    on = [last["gpu"], *versions, *([last["date"]] if last.get("date") else [])]
    return {"on": ", ".join(on), "triton_speed": speeds(rows)}


def table(made: Mapping[str, Any]) -> str:
    """The page's table: a line for each op and kind, what runs it and by how much."""
    lines = [
        f"Measured on {made['on']}.",
        "",
        "| op | kind | default | triton's speed, cuda = 1 |",
        "|---|---|---|---|",
    ]
    for op, kinds in made["triton_speed"].items():
        for kind, speed in kinds.items():
            name = "triton" if speed > 1 + MARGIN else "cuda"
            lines.append(f"| `{op}` | {kind} | {name} | {speed:.2f} |")
    return "\n".join(lines)


def replaced(page: str, text: str) -> str:
    """The page with the text between its marks."""
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"page: expected {MARKS[0]} ... {MARKS[1]}, got neither; put them back")
    return f"{before}{mark}\n{text}\n{end}{after}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", type=Path, help="CSV files")
    parser.add_argument("--output", type=Path, default=CHOICES)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    made = choices(read(options.tables))
    page = replaced(options.page.read_text(encoding="utf-8"), table(made))
    options.output.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    options.page.write_text(page, encoding="utf-8")
    print(table(made))


if __name__ == "__main__":
    main(sys.argv[1:])
