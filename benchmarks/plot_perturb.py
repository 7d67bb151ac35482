"""The plot of bench_perturb.py, made from its CSV and written beside it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTESTANTS = ["cuda", "triton", "compiled", "addmm_", "eager"]
NAMES = {"compiled": "torch.compile", "eager": "eager line"}
COLOURS = ["#1b6ca8", "#2a9d5c", "#e0a030", "#999999", "#d1495b"]
DTYPES = {"bf16": "-", "fp16": "--", "fp32": ":"}
SINGLE = "5120x5120"

Row = dict[str, str]


def plot(table: Path) -> Path:
    """Whole models on the left, one 5120 x 5120 by rank on the right; shares of an in-place add."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.8), dpi=160, sharey=True, width_ratios=[3, 2]
    )
    _bars(left, rows)
    _lines(right, [row for row in rows if row["what"] == SINGLE])
    for axes in (left, right):
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylim(0, 1.1)
        axes.grid(axis="y", alpha=0.3)
    ceiling = float(rows[0]["add_tb_s"])
    left.set_ylabel(f"share of an in-place add ({ceiling:.2f} TB/s)")
    figure.suptitle(f"W += eps mu U Z V$^T$, read plus written, on {rows[0]['gpu']}", fontsize=10)
    key = dict(fontsize=8, loc="upper center", frameon=False, bbox_to_anchor=(0.5, 0.955))
    figure.legend(handles=_key(), ncols=len(CONTESTANTS) + len(DTYPES), **key)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    path = table.with_suffix(".png")
    figure.savefig(path)
    plt.close(figure)
    print(f"written: {path}")
    return path


def _key() -> list[Any]:
    """Colours of contestants and dashes of dtypes, for both sides."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [NAMES.get(name, name) for name in CONTESTANTS]
    colours = [Patch(color=each, label=name) for each, name in zip(COLOURS, names, strict=True)]
    dashes = [Line2D([], [], color="black", ls=dash, label=name) for name, dash in DTYPES.items()]
    return colours + dashes


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """perturb_many_ and fold_ over many weights: a group of bars for each."""
    many = [row for row in rows if row["op"] != "perturb_"]
    groups = list(dict.fromkeys((row["op"], row["what"], row["dtype"]) for row in many))
    share = {
        (row["op"], row["what"], row["dtype"], row["contestant"]): float(row["of_add"])
        for row in many
    }
    width = 0.8 / len(CONTESTANTS)
    for i, name in enumerate(CONTESTANTS):
        places = [(at, group) for at, group in enumerate(groups) if (*group, name) in share]
        if places:
            axes.bar(
                [at + (i - 2) * width for at, _ in places],
                [share[(*group, name)] for _, group in places],
                width,
                color=COLOURS[i],
            )
    titles = [f"{what} {dtype}{' fold_' * (op == 'fold_')}" for op, what, dtype in groups]
    axes.set_xticks(range(len(groups)), titles, fontsize=7, rotation=90)


def _lines(axes: Any, rows: Sequence[Row]) -> None:
    """One matrix by rank: a line for each contestant and dtype."""
    for name, colour in zip(CONTESTANTS, COLOURS, strict=True):
        for dtype, dash in DTYPES.items():
            found = [row for row in rows if (row["contestant"], row["dtype"]) == (name, dtype)]
            points = sorted((int(row["rank"]), float(row["of_add"])) for row in found)
            if points:
                ranks, shares = zip(*points, strict=True)
                axes.plot(ranks, shares, dash, color=colour, marker="o", markersize=3)
    ranks = sorted({int(row["rank"]) for row in rows})
    if ranks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
    axes.set_xlabel(f"rank, one {SINGLE}")
