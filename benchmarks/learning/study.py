"""The study: every method on every task at every budget, learning rates chosen on dev.

    python benchmarks/learning/study.py --model MODEL --data FOLDER --results study.csv

Runs what the results file lacks, many at a time, until everything is there or ``--minutes`` are
over: first one selection run for each candidate (learning rates, for some methods also queries and
modules; dev only), then five seeds with the best one, whose test scores are read once.
``--jobs FILE`` runs a list of one's own instead: jobs, or cells, which give "choices" and "seeds"
in place of "choice", "seed" and "test" and choose on dev before they score. "expected" says how
many seconds a run takes; one that would not end in time is not started.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing as mp
import queue
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods import METHODS
from run import Bench, Record, key

BUDGETS = (100, 300, 2000)
SEEDS = range(5)
SELECTION_SEED = 100
TASKS = ("sst2", "reviews", "rte")
# Where every row is scored a query costs the whole group. RTE: whether it carries over.
METHODS_OF = {
    "sst2": list(METHODS),
    "reviews": [name for name in METHODS if not name.endswith("-rows")],
    "rte": ["mezo", "weight-norm", "core-rows", "right-rows", "full-rows", "adamw", "adamw-lora"],
}
LONG = (10000, range(2), "sst2")
COLUMNS = (
    "task", "method", "budget", "choice", "seed", "test", "steps", "cost", "seconds", "skipped",
    "loss", "best_at", "dev_accuracy", "dev_loss", "end_accuracy", "end_loss", "test_accuracy",
    "test_loss", "device", "torch", "date",
)  # fmt: skip


def main() -> None:
    """Parse, run, leave a results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--data", required=True, type=Path, help="folder with the tasks' files")
    parser.add_argument("--results", required=True, type=Path, help="CSV, appended to")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this")
    parser.add_argument("--workers", type=int, default=1, help="processes on each device")
    parser.add_argument("--devices", nargs="+", default=["auto"], help="cuda:0 cuda:1, or cpu")
    parser.add_argument("--dtype", default="float32", help="of the model's weights")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="in their order"
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--long", nargs="*", default=[], help="methods to run at 10,000")
    parser.add_argument("--jobs", type=Path, help="JSON list of jobs and cells to run instead")
    args = parser.parse_args()
    records = read(args.results)
    planner = Planner(args, records)
    with mp.get_context("spawn").Manager() as manager:
        todo, done = manager.Queue(), manager.Queue()
        workers = []
        for device in args.devices:
            for _ in range(args.workers):
                context = mp.get_context("spawn")
                process = context.Process(target=work, args=(args, device, todo, done), daemon=True)
                process.start()
                workers.append(process)
        collect(planner, workers, todo, done, args)


def collect(planner: Planner, workers: list[Any], todo: Any, done: Any, args: Any) -> None:
    """Hand out jobs, write records down, until nothing is left or the time is over."""
    end = time.monotonic() + 60 * args.minutes
    running = 0
    fresh = not args.results.exists()
    with open(args.results, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        if fresh:
            writer.writeheader()
        while True:
            left = end - time.monotonic()
            while left > 0 and running < len(workers) and (job := planner.next(left)) is not None:
                todo.put(job)
                running += 1
            if not running:
                break
            try:
                record = done.get(timeout=5)
            except queue.Empty:
                if not any(process.is_alive() for process in workers):
                    raise RuntimeError("every worker has died; see their messages") from None
                if time.monotonic() > end + 25:
                    print(f"time is over, {running} unfinished runs are left out", flush=True)
                    break
                continue
            running -= 1
            planner.finished(record)
            if "error" not in record:
                writer.writerow(record | {"choice": json.dumps(record["choice"])})
                file.flush()
            print(line(record), flush=True)
    for process in workers:
        process.kill()


class Planner:
    """Which job comes next: long runs first, then by task, method, budget; tests after dev."""

    def __init__(self, args: Any, records: list[Record]) -> None:
        self.records = records
        self.given = {key(r) for r in records}
        self.own = json.loads(args.jobs.read_text()) if args.jobs else None
        self.args = args
        self.ready = list(self._missing())

    def _missing(self) -> Iterator[Record]:
        if self.own is not None:
            for given in self.own:
                if "choices" in given:
                    yield from self._own_cell(**given)
                elif self._lacks(given):
                    yield given
            return
        for name in self.args.long:
            yield from self._cell(LONG[2], LONG[0], name, LONG[1])
        for task in self.args.tasks:
            for name in (name for name in self.args.methods if name in METHODS_OF[task]):
                for budget in sorted(self.args.budgets, reverse=True):
                    yield from self._cell(task, budget, name, SEEDS)

    def _own_cell(
        self,
        task: str,
        method: str,
        budget: int,
        choices: list[Record],
        seeds: list[int],
        expected: float = 0.0,
    ) -> Iterator[Record]:
        for job in self._cell(task, budget, method, seeds, choices):
            yield job | {"expected": expected}

    def _cell(
        self,
        task: str,
        budget: int,
        name: str,
        seeds: Any,
        choices: list[Record] | None = None,
    ) -> Iterator[Record]:
        # at 10,000 forwards the learning rate chosen at 2,000 is divided by the root of five
        at = min(budget, 2000)
        choices = choices or METHODS[name].candidates(at, by_token=task == "reviews")
        select = [self._job(task, name, at, c, SELECTION_SEED, False) for c in choices]
        missing = [job for job in select if self._lacks(job)]
        yield from missing
        ended = {key(r) for r in self.records}
        if any(key(job) not in ended for job in select):
            return
        chosen = best_choice(self.records, task, name, at, len(select))
        if chosen is None:
            return
        if budget > at:
            chosen = chosen | {"lr": chosen["lr"] / 5**0.5}
        for seed in seeds:
            job = self._job(task, name, budget, chosen, seed, True)
            if self._lacks(job):
                yield job

    @staticmethod
    def _job(task: str, name: str, budget: float, choice: Record, seed: int, test: bool) -> Record:
        return dict(task=task, method=name, budget=budget, choice=choice, seed=seed, test=test)

    def _lacks(self, job: Record) -> bool:
        return key(job) not in self.given

    def next(self, left: float = math.inf) -> Record | None:
        """A job nobody works on that ends within ``left`` seconds, or None for now."""
        if not self.ready:
            self.ready = list(self._missing())
        job = next((job for job in self.ready if job.get("expected", 0) <= left), None)
        if job is not None:
            self.ready.remove(job)
            self.given.add(key(job))
        return job

    def finished(self, record: Record) -> None:
        """Take note; perhaps its cell's final runs can start now, before shorter ones."""
        self.records.append(record)
        self.ready = list(self._missing())


def best_choice(
    records: list[Record], task: str, method: str, budget: float, count: int
) -> Record | None:
    """By dev accuracy, ties by dev loss; None until all ``count`` candidates have run."""
    wanted = (task, method, budget, SELECTION_SEED, False)
    names = ("task", "method", "budget", "seed", "test")
    runs = [r for r in records if tuple(r[n] for n in names) == wanted]
    if len(runs) < count:
        return None
    runs = [r for r in runs if "error" not in r]
    if not runs:
        return None
    return max(runs, key=lambda r: (r["dev_accuracy"], -r["dev_loss"]))["choice"]


def work(args: Any, device: str, todo: Any, done: Any) -> None:
    """A process that runs jobs on one device until it is killed."""
    bench = Bench(args.model, args.data, device, args.dtype)
    while True:
        job = todo.get()
        try:
            record = bench.run(job)
        except Exception as error:  # one run that fails is a record, not the end of the study
            traceback.print_exc()
            record = job | {"error": f"{type(error).__name__}: {error}"}
        done.put(record)


def read(path: Path) -> list[Record]:
    """The records of a results file; none where it is missing."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [_typed(row) for row in csv.DictReader(file)]


def _typed(row: dict[str, str]) -> Record:
    """Numbers as numbers, the choice as what it was; empty fields left out."""
    record: Record = {"task": row["task"], "method": row["method"]}
    record |= {"choice": json.loads(row["choice"]), "test": row["test"] == "True"}
    record |= {name: row[name] for name in ("device", "torch", "date")}
    for name, text in row.items():
        if name not in record and text:
            record[name] = float(text) if any(c in text for c in ".en") else int(text)
    return record


def line(r: Record) -> str:
    """One line on a finished run."""
    head = f"{r['task']} {r['method']} {r['budget']} {r['choice']} seed={r['seed']}"
    if "error" in r:
        return f"{head} {r['error']}"
    test = " ".join(f"{k}={r[k]:.4f}" for k in r if k.startswith("test_"))
    dev = f"dev={r['dev_accuracy']:.4f}/{r['dev_loss']:.4f}@{r['best_at']}"
    return f"{head} {dev} {test} steps={r['steps']} s={r['seconds']}"


if __name__ == "__main__":
    main()
