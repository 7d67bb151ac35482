"""Rows from files or `datasets` names, and their division into train, dev and test."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CommandError
from .tasks import Example, Task, make_examples

FILES = (".csv", ".tsv", ".jsonl", ".json")


def load_examples(task: Task, data: str | None, data_split: str = "train") -> list[Example]:
    """All examples of a CSV / TSV / JSONL file or of a `datasets` name ("name" or "name/config").

    Raises:
        CommandError: nothing there, a file that does not parse, a missing column, a label not in
            the task, no rows.
    """
    source = data or task.data
    if source is None:
        raise CommandError(
            f"--data: task {task.name!r} needs a CSV, TSV or JSONL file or a datasets name"
        )
    path = Path(source).expanduser()
    with tempfile.TemporaryDirectory() as cache:
        if path.is_dir():
            dataset = _read_name(str(path), data_split, cache_dir=cache, keep_in_memory=True)
        elif path.suffix.lower() in FILES or path.exists():
            dataset = _read_file(path, cache)
        else:
            dataset = _read_name(source, data_split)
        missing = [c for c in task.columns() if c not in dataset.column_names]
        if missing:
            raise CommandError(
                f"{source}: no column {missing[0]!r}, found {', '.join(dataset.column_names)}; "
                "set --text-column, --label-column or --template"
            )
        rows = _named_labels(task, dataset.select_columns(task.columns()))
        examples = make_examples(task, rows, source)
    if not examples:
        raise CommandError(f"{source}: no rows")
    return examples


def _read_file(path: Path, cache: str) -> Any:
    import datasets
    import pandas

    if not path.is_file():
        raise CommandError(f"--data: no such file: {path}")
    if path.stat().st_size == 0:
        raise CommandError(f"{path}: the file is empty")
    datasets.disable_progress_bars()
    kind = path.suffix.lower()
    try:
        if kind in (".json", ".jsonl"):
            return datasets.Dataset.from_json(str(path), cache_dir=cache, keep_in_memory=True)
        if kind in (".csv", ".tsv"):
            # Everything stays text: "NA" is a word, and "007" is not the label 7. A TSV has no
            # quoting: a lone quotation mark in a sentence must not swallow the rows after it.
            how: dict[str, Any] = {"sep": "\t", "quoting": 3} if kind == ".tsv" else {}
            frame = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False, **how)
            return datasets.Dataset.from_pandas(frame, preserve_index=False)
    except Exception as error:  # each parser raises its own kinds
        reason = str(error.__cause__ or error).strip().splitlines()
        raise CommandError(
            f"{path}: cannot be read as {kind[1:].upper()}: {reason[0] if reason else error!r}"
        ) from error
    raise CommandError(f"--data: expected a file ending in {', '.join(FILES)}, got {path}")


def _read_name(source: str, split: str, **how: Any) -> Any:
    import datasets

    parts = source.split("/")
    # "name/config" and "owner/name/config" name a configuration; "owner/name" alone does not.
    folder = Path(source).is_dir()
    tries: list[tuple[str, str | None]] = [(source, None)] if folder or len(parts) < 3 else []
    if len(parts) > 1 and not folder:
        tries.append(("/".join(parts[:-1]), parts[-1]))
    reason: Exception | None = None
    for name, config in tries:
        try:
            return datasets.load_dataset(name, config, split=split, **how)
        except Exception as error:  # offline, unknown name, gated, unknown split: as many types
            reason = reason or error
    first = (str(reason).strip().splitlines() or [repr(reason)])[0]
    raise CommandError(
        f"--data: no file {source!r}, and `datasets` cannot load split {split!r} of it: {first}"
    )


def _named_labels(task: Task, dataset: Any) -> Iterable[Mapping[str, Any]]:
    """Rows; class labels of `datasets` by name where the task names them so."""
    feature = dataset.features.get(task.label_column) if task.words else None
    names = getattr(feature, "names", None)
    if names and all(label in names for label in task.labels):
        return (
            {**row, task.label_column: names[row[task.label_column]]}
            if row[task.label_column] is not None and row[task.label_column] >= 0
            else row
            for row in dataset
        )
    return dataset


def split_examples(
    examples: Sequence[Example], train: int, dev: int, test: int, seed: int
) -> tuple[dict[str, list[Example]], int]:
    """Disjoint train, dev and test, each with the labels in the proportions of the whole.

    A prompt that occurs more than once (case and spaces aside) counts once, so that no test
    sentence was ever trained on. dev and test get exactly what was asked, train at most that.

    Returns:
        {"train", "dev", "test"} -> examples, and how many duplicates were left out.
    """
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        if size < 1:
            raise CommandError(f"--{name}-examples: expected at least 1, got {size}")
    distinct: dict[str, Example] = {}
    for example in examples:
        distinct.setdefault(" ".join(example.prompt.casefold().split()), example)
    rest = len(distinct) - dev - test
    if rest < 1:
        raise CommandError(
            f"--dev-examples {dev} and --test-examples {test} leave nothing to train on: "
            f"the data has {len(distinct)} distinct examples; ask for fewer"
        )
    rng = random.Random(seed)
    pools: dict[int, list[Example]] = {}
    for example in distinct.values():
        pools.setdefault(example.label, []).append(example)
    for label in sorted(pools):
        rng.shuffle(pools[label])
    splits: dict[str, list[Example]] = {}
    for name, size in (("test", test), ("dev", dev), ("train", min(train, rest))):
        chosen = []
        for label, count in _shares({k: len(v) for k, v in pools.items()}, size).items():
            chosen += pools[label][:count]
            del pools[label][:count]
        rng.shuffle(chosen)
        splits[name] = chosen
    return splits, len(examples) - len(distinct)


def _shares(sizes: Mapping[int, int], total: int) -> dict[int, int]:
    """Whole numbers proportional to sizes that add up to total: largest remainders first."""
    whole = sum(sizes.values())
    exact = {k: total * n / whole for k, n in sorted(sizes.items())}
    shares = {k: int(x) for k, x in exact.items()}
    by_remainder = sorted(exact, key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: total - sum(shares.values())]:
        shares[k] += 1
    return shares
