"""The study's plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Colour tells the family or the form, a broken line whole groups; markers serve without colours.
STYLES: dict[str, tuple[str, str, str]] = {
    "core-rows": ("#1b6ca8", "-", "o"),
    "right-rows": ("#2a9d5c", "-", "s"),
    "full-rows": ("#d1495b", "-", "^"),
    "core-whole": ("#1b6ca8", "--", "o"),
    "right-whole": ("#2a9d5c", "--", "s"),
    "full-whole": ("#d1495b", "--", "^"),
    "weight-norm": ("#8a6d3b", "-", "D"),
    "weight-muon": ("#8a6d3b", "--", "v"),
    "weight-sgd": ("#8a6d3b", ":", "P"),
    "mezo": ("#777777", "-", "X"),
    "adamw": ("#000000", "-", "*"),
    "adamw-lora": ("#000000", "--", "*"),
}
NAMES = {"sst2": "SST-2", "rte": "RTE", "reviews": "movie-review sentences"}


def draw(
    found: Mapping[tuple[str, int], Any], methods: Sequence[str], budgets: Sequence[int], task: str,
    path: Path,
) -> None:  # fmt: skip
    """Score against cost: all methods on the left, the upper part larger on the right.

    Args:
        found: by method and budget, something with ``scores``, one a seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5), dpi=160)
    best = [statistics.mean(one.scores) for one in found.values() if one.scores]
    for axes in (left, right):
        for i, method in enumerate(methods):
            points = [(b, found[method, b].scores) for b in budgets if (method, b) in found]
            points = [(b, scores) for b, scores in points if scores]
            colour, dash, marker = STYLES[method]
            shift = 1 + 0.022 * (i - 5.5)  # error bars side by side
            axes.errorbar(
                [b * shift for b, _ in points],
                [statistics.mean(scores) for _, scores in points],
                [statistics.stdev(s) if len(s) > 1 else 0.0 for _, s in points],
                label=method, color=colour, linestyle=dash, marker=marker, markersize=5,
                linewidth=1.4, elinewidth=0.9, capsize=2,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{b:,}" for b in budgets])
        axes.minorticks_off()
        axes.set_xlabel("cost in forwards of 16 examples")
        axes.grid(alpha=0.3)
    loss = task == "reviews"
    left.set_ylabel("test loss" if loss else "test accuracy")
    left.set_title(f"{NAMES[task]}: all methods", fontsize=11)
    right.set_title("the upper part", fontsize=11)
    low, high = min(best), max(best)
    if loss:
        right.set_ylim(low - 0.03, low + 0.4 * (high - low))
    else:
        right.set_ylim(high - 0.35 * (high - low), high + 0.01)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(path, metadata={"Software": None})  # the same bytes from the same numbers
    plt.close(figure)
