"""What a run shows and leaves behind: progress, tables, the plot, the output folder's files."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .evaluation import Scores
from .settings import METHODS, Settings


def header(rows: Mapping[str, str]) -> Table:
    """What will be trained on what."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            table.add_row(name, escape(text))
    return table


def line(name: str, scores: Scores) -> str:
    """One evaluation as text."""
    if scores.accuracy is None:
        return f"{name} loss {scores.loss:.4f}, perplexity {math.exp(min(scores.loss, 700)):.2f}"
    return f"{name} loss {scores.loss:.4f}, accuracy {scores.accuracy:.1%}"


class Bar:
    """Steps done, loss, training examples per second (evaluations aside) and time left.

    ``pace`` is the same as text, for the lines that stay.
    """

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("training", total=steps, loss="", speed="", left="")
        self._steps = steps
        self._done = 0
        self._busy = 0.0
        self.pace = ""
        self._begin = self._entered = time.perf_counter()

    def step_begins(self) -> None:
        self._entered = time.perf_counter()

    def step_ends(self, loss: float, examples: int) -> float:
        """Show the step just made; returns its seconds."""
        now = time.perf_counter()
        self._busy += now - self._entered
        self._done += 1
        # Time left counts the evaluations so far as part of the pace; examples per second do not.
        left = (now - self._begin) / self._done * (self._steps - self._done)
        shown: dict[str, Any] = {
            "loss": f"loss {loss:.4f}",
            "speed": f"{self._done * examples / self._busy:.1f} examples/s",
            "left": f"{_minutes(left)} left",
        }
        self.pace = ", ".join(shown.values())
        self._progress.update(self._task, completed=self._done, **shown)
        return now - self._entered

    def say(self, text: str) -> None:
        """A line that stays above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Bar]:
    """The bar of a training run; where there is no terminal, only the lines said are printed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn("{task.fields[" + name + "]}") for name in ("loss", "speed", "left")),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        yield Bar(shown, steps)


def summary(metrics: Mapping[str, Any], output: Path) -> Table:
    """Before and after on the same test examples."""
    test = metrics["test"]
    table = Table(title=f"{test['examples']} test examples", title_justify="left")
    labelled = "accuracy" in test["after"]
    table.add_column("")
    table.add_column("loss", justify="right")
    table.add_column("accuracy" if labelled else "perplexity", justify="right")

    def row(name: str, scores: Mapping[str, float], style: str = "") -> None:
        value = _percent(scores["accuracy"], test["examples"]) if labelled else _perplexity(scores)
        table.add_row(name, f"{scores['loss']:.4f}" if "loss" in scores else "", value, style=style)

    row("before" + (", zero-shot" if labelled else ""), test["before"])
    if "zero_shot_calibrated" in test:
        row("before, zero-shot calibrated", {"accuracy": test["zero_shot_calibrated"]})
    row(f"after {metrics['best']['step']} steps (best on dev)", test["after"], "bold")
    seconds, skipped = metrics["seconds"], metrics["skipped_steps"]
    table.caption = (
        f"{METHODS[metrics['method']]}: {metrics['steps']} steps"
        + (f", {skipped} skipped for a loss that was not finite" if skipped else "")
        # lines no longer than the table is wide
        + f"\n{metrics['forwards']:,.0f} forwards of {metrics['batch_size']} examples in "
        f"{_minutes(seconds['steps'])} min"
        f"\n{_minutes(seconds['training'])} min with evaluations on dev"
        + f"\n{escape(str(output))}"
    )
    table.caption_justify = "left"
    return table


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _percent(accuracy: float, examples: int) -> str:
    error = math.sqrt(accuracy * (1 - accuracy) / examples)
    return f"{accuracy:.1%} ± {100 * error:.1f}"


def _perplexity(scores: Mapping[str, float]) -> str:
    return f"{math.exp(min(scores['loss'], 700)):.2f}"


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    metrics: Mapping[str, Any],
    settings: Settings,
    command: str,
) -> None:
    """The files of the output folder: the model as plain transformers loads it, and the record."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = {"settings": asdict(settings), "versions": versions()}
    # config.json is the model's own.
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    plot(folder / "training.png", metrics)
    metrics = {
        **metrics,
        "train_loss": [x if math.isfinite(x) else None for x in metrics["train_loss"]],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "command.txt").write_text(command + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    import torch
    import transformers

    from . import __version__

    return {
        "subzero-kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def plot(path: Path, metrics: Mapping[str, Any]) -> None:
    """Loss, and with labels accuracy, against steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    test, dev, best = metrics["test"], metrics["dev"], metrics["best"]
    labelled = "accuracy" in test["after"]
    figure = Figure(figsize=(10 if labelled else 6, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if labelled else 1, squeeze=False)[0]
    steps = [d["step"] for d in dev]

    losses = metrics["train_loss"]
    finite = [(i, x) for i, x in enumerate(losses) if math.isfinite(x)]
    axes[0].plot(*_columns(finite), color="0.75", lw=1, label="training batch")
    axes[0].plot(*_columns(_smooth(finite)), color="C0", lw=1.5, label="training, mean of 9")
    axes[0].plot(steps, [d["loss"] for d in dev], "o-", color="C1", label="dev")
    axes[0].set(xlabel="step", ylabel="loss")
    if labelled:
        right, after = axes[1], test["after"]["accuracy"]
        right.plot(steps, [100 * d["accuracy"] for d in dev], "o-", color="C1", label="dev")
        for value, style, name in (
            (test["before"]["accuracy"], ":", "test, zero-shot"),
            (test["zero_shot_calibrated"], "--", "test, zero-shot calibrated"),
        ):
            right.axhline(100 * value, color="0.5", ls=style, label=f"{name} {value:.1%}")
        right.plot(
            best["step"], 100 * after, "*", color="C3", ms=14, label=f"test, after {after:.1%}"
        )
        right.set(xlabel="step", ylabel="accuracy (%)")
    for axis in axes:
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smooth(points: list[tuple[int, float]], half: int = 4) -> list[tuple[int, float]]:
    """Centred running mean, over fewer points at the ends."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        smoothed.append((x, sum(near) / len(near)))
    return smoothed
