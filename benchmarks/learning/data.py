"""The study's tasks: SST-2, RTE and movie-review sentences as a language-model task.

Files stay where they are: ``--data`` names a folder with stsa.binary.{train,dev,test} ("label
text" lines, latin-1), RTE.{train,dev}.tsv (GLUE) and movie-reviews.tsv (``python -m subzero.demo``
writes it to .cache).
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

from subzero.tasks import TASKS, Example, Task, make_examples

TRAIN_EXAMPLES = 1000
SPLIT_SEED = 0


@dataclass(frozen=True)
class Data:
    """One task: examples to train on, to choose by, and to report on once."""

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]


def load(name: str, folder: Path) -> Data:
    """The named task from ``folder``: "sst2", "rte" or "reviews"."""
    return {"sst2": _sst2, "rte": _rte, "reviews": _reviews}[name](folder)


def _sst2(folder: Path) -> Data:
    task = Task("sst2", "{x} It was", {"0": "terrible", "1": "great"})

    def part(name: str) -> list[Example]:
        lines = (folder / f"stsa.binary.{name}").read_text(encoding="latin-1").splitlines()
        rows = [dict(zip(("label", "text"), line.split(" ", 1), strict=True)) for line in lines]
        return make_examples(task, rows, name)

    return Data(task, _sample(part("train"), TRAIN_EXAMPLES)[0], part("dev"), part("test"))


def _rte(folder: Path) -> Data:
    """There is no test file: 277 rows held out of train choose, dev is reported."""
    task = Task(
        "rte", TASKS["rte"].template, {"entailment": "Yes", "not_entailment": "No"}, "premise"
    )

    def part(name: str) -> list[Example]:
        with open(folder / f"RTE.{name}.tsv", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return make_examples(
                task,
                [
                    {"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": r["label"]}
                    for r in rows
                ],
                name,
            )

    held_out, rest = _sample(part("train"), 277)
    return Data(task, _sample(rest, TRAIN_EXAMPLES)[0], held_out, part("dev"))


def _reviews(folder: Path) -> Data:
    """Language modelling on sentences: labels are not used."""
    task = Task("reviews")
    lines = (folder / "movie-reviews.tsv").read_text(encoding="utf-8").splitlines()[1:]
    examples = [Example(line.rsplit("\t", 1)[0]) for line in lines]
    train, rest = _sample(examples, TRAIN_EXAMPLES)
    dev, rest = _sample(rest, 500)
    return Data(task, train, dev, _sample(rest, 1000)[0])


def _sample(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """``count`` of them, and the others, the same in every run."""
    order = list(range(len(examples)))
    random.Random(SPLIT_SEED).shuffle(order)
    return [examples[i] for i in order[:count]], [examples[i] for i in order[count:]]
