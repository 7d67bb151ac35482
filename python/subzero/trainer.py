"""``subzero train``: evaluate, train, keep the best on dev, test once, save."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from . import report
from .batches import Encoder, TrainBatches
from .checkpoint import check_output, write_folder
from .data import load_examples, split_examples
from .errors import CommandError
from .evaluation import Scores, calibrated_accuracy, evaluate
from .methods import Method, choose_method
from .models import load_model
from .objectives import LogitsLoss, label_words, next_token
from .settings import Settings, methods_to_try
from .tasks import Example, describe, make_task, word_ids

BASIS_EXAMPLES = 64  # what the first bases of activation noise are taken from


def train(settings: Settings, command: str, console: Console | None = None) -> dict[str, Any]:
    """Run one fine-tune and write its folder; returns what metrics.json holds.

    Everything that can be wrong with what was asked is found before training starts, the cheapest
    checks first. Splits are disjoint; the test split is evaluated before training, for comparison,
    and once at the end, on the weights that were best on dev.

    Raises:
        CommandError: anything the user can put right.
    """
    console = console or Console()
    begin = time.perf_counter()
    _check(settings)
    output = Path(settings.output).expanduser()
    check_output(output, settings.overwrite)
    task = make_task(
        settings.task, settings.template, settings.label_words, settings.text_column,
        settings.label_column,
    )  # fmt: skip
    examples = load_examples(task, settings.data, settings.data_split)
    splits, duplicates = split_examples(
        examples, settings.train_examples, settings.dev_examples, settings.test_examples,
        settings.split_seed,
    )  # fmt: skip
    with console.status(f"loading {escape(settings.model)}"):
        loaded = load_model(settings.model, settings.dtype, settings.device)
    words = word_ids(task, loaded.tokenizer)
    model = loaded.model
    encoder = Encoder(loaded.tokenizer, model, settings.max_tokens)
    objective = label_words(words) if words else next_token()
    short = 0 if words else _leave_out_short(splits, encoder)
    settings, method, trained, why = choose_method(settings, model, bool(words))
    check_output(output, settings.overwrite, needed=_bytes(model))
    console.print(
        report.header(
            {
                "model": f"{loaded.label} ({settings.dtype}, {encoder.device})",
                "task": f"{task.name}: {describe(task, splits['train'])}",
                "data": f"{settings.data or task.data}: {len(splits['train'])} train, "
                f"{len(splits['dev'])} dev, {len(splits['test'])} test"
                + (f" ({duplicates} duplicates left out)" if duplicates else "")
                + (f" ({short} of a single token left out)" if short else ""),
                "method": why,
                "trained": trained,
                "plan": method.plan_summary(),
            }
        )
    )

    with console.status("evaluating before training"):
        before = evaluate(model, objective, encoder, splits["test"])
    console.print(report.line("before: test", before), highlight=False)
    run = _Run(settings, method, objective, model, console)
    run.train(encoder, splits["train"], lambda: evaluate(model, objective, encoder, splits["dev"]))
    run.best.restore()
    method.detach()
    with console.status("evaluating on test"):
        after = evaluate(model, objective, encoder, splits["test"])

    metrics: dict[str, Any] = {
        "method": settings.method,
        "test": {
            "examples": len(splits["test"]),
            "before": before.summary(),
            "after": after.summary(),
        },
        "best": {"step": run.best.step, **run.best.scores.summary()},
        "dev": run.dev,
        "train_loss": run.losses,
        "duplicates_left_out": duplicates,
        "steps": len(run.losses),
        "skipped_steps": method.skipped,
        "batch_size": run.batch_size,
        # of one batch through the whole model, evaluations aside
        "forwards": round(run.forwards, 2),
        "seconds": {
            "steps": run.seconds_of_steps,
            "training": run.seconds,
            "total": time.perf_counter() - begin,
        },
    }
    if before.logits is not None:
        metrics["test"]["zero_shot_calibrated"] = calibrated_accuracy(before.logits, splits["test"])
    with console.status(f"saving to {escape(str(output))}"):
        write_folder(
            output,
            lambda folder: report.save(
                folder, loaded.model, loaded.tokenizer, metrics, settings, command
            ),
            settings.overwrite,
        )
    console.print(report.summary(metrics, output))
    return metrics


def _leave_out_short(splits: dict[str, list[Example]], encoder: Encoder) -> int:
    """Language modelling needs a token and its successor; returns how many texts have none."""
    count = 0
    for name, rows in splits.items():
        kept = [e for e, ids in zip(rows, encoder.encode(rows), strict=True) if len(ids) > 1]
        if not kept:
            raise CommandError(
                f"--data: expected texts of at least two tokens, got none for {name}; "
                "check --text-column, --template and --max-tokens"
            )
        count += len(rows) - len(kept)
        splits[name] = kept
    return count


class _Best:
    """The trained weights of the best evaluation so far: only what requires grad is copied."""

    def __init__(self, model: torch.nn.Module, method: Method) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.method = method
        self.copies: list[torch.Tensor] = []
        self.step = -1
        self.scores = Scores(math.inf)

    def offer(self, step: int, scores: Scores) -> bool:
        """Keep the weights if these scores are better; the first always are."""
        if self.step >= 0 and not scores.better_than(self.scores):
            return False
        self.method.fold()
        if self.copies:
            for copy, p in zip(self.copies, self.parameters, strict=True):
                copy.copy_(p.detach())
        else:
            self.copies = [p.detach().clone() for p in self.parameters]
        self.step, self.scores = step, scores
        return True

    def restore(self) -> None:
        """Put the kept weights back."""
        self.method.fold()
        with torch.no_grad():
            for copy, p in zip(self.copies, self.parameters, strict=True):
                p.copy_(copy)


class _Run:
    """The training loop and its record."""

    def __init__(
        self,
        settings: Settings,
        method: Method,
        objective: LogitsLoss,
        model: torch.nn.Module,
        console: Console,
    ) -> None:
        assert settings.steps and settings.eval_every and settings.schedule, "filled"
        self.settings = settings
        self.steps, self.eval_every = settings.steps, settings.eval_every
        self.factor = schedule(settings.schedule, settings.steps)
        self.method = method
        self.objective = objective
        self.console = console
        self.best = _Best(model, method)
        self.losses: list[float] = []
        self.dev: list[dict[str, Any]] = []
        self.batch_size = 0
        self.forwards = 0.0
        self.seconds_of_steps = 0.0
        self.seconds = 0.0

    def train(
        self, encoder: Encoder, examples: list[Example], evaluate_dev: Callable[[], Scores]
    ) -> None:
        """All steps, with an evaluation on dev before, after, and every eval_every steps."""
        limit = self.settings.max_minutes
        batches = TrainBatches(encoder, examples, self.settings.batch_size, self.settings.seed)
        self.batch_size = batches.size
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.method.optimizer, self.factor)
        begin = time.perf_counter()
        with report.progress(self.console, self.steps) as bar:
            self._evaluate(evaluate_dev, bar)
            self._prepare(encoder, examples)
            for batch in batches:
                bar.step_begins()
                loss = float(self.method.step(batch, self.objective))
                scheduler.step()
                self.losses.append(loss)
                self.seconds_of_steps += bar.step_ends(loss, batches.size)
                self.forwards += self.method.forwards(batch, self.objective)
                done = len(self.losses)
                late = limit is not None and time.perf_counter() - begin > 60 * limit
                if late or done == self.steps or done % self.eval_every == 0:
                    self._evaluate(evaluate_dev, bar)
                if late and done < self.steps:
                    bar.say(f"stopped after step {done}: --max-minutes {limit:g} is over")
                if late or done == self.steps:
                    break
        self.seconds = time.perf_counter() - begin
        if self.method.skipped == len(self.losses):
            raise CommandError(
                "the loss was not finite in any step, so nothing was trained; "
                "try --dtype float32, or a smaller --eps or --lr",
                code=1,
            )

    def _prepare(self, encoder: Encoder, examples: list[Example]) -> None:
        """Batches of their own, so that the order of training is the same for every method."""
        begin = time.perf_counter()
        some = TrainBatches(encoder, examples, self.settings.batch_size, self.settings.seed)
        count = min(-(-BASIS_EXAMPLES // some.size), len(examples) // some.size)
        batches = list(itertools.islice(some, count))
        self.forwards += self.method.prepare(batches, self.objective)
        self.seconds_of_steps += time.perf_counter() - begin

    def _evaluate(self, evaluate_dev: Callable[[], Scores], bar: report.Bar) -> None:
        step = len(self.losses)
        scores = evaluate_dev()
        self.dev.append({"step": step, **scores.summary()})
        best = self.best.offer(step, scores)
        text = report.line("dev", scores) + (", best so far" if best and step else "")
        bar.say(f"step {step}: " + "; ".join(filter(None, (bar.pace, text))))


def schedule(name: str, steps: int) -> Callable[[int], float]:
    """The factor on lr after a number of steps: "cosine" or "linear" to 0, or "constant"."""
    if name == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    if name == "linear":
        return lambda step: 1 - min(step / steps, 1.0)
    return lambda step: 1.0


def _check(s: Settings) -> None:
    methods_to_try(s)
    for name in ("steps", "batch_size", "eval_every", "max_tokens"):
        value = getattr(s, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if s.schedule not in (None, "cosine", "linear", "constant"):
        raise CommandError(f"--schedule: expected cosine, linear or constant, got {s.schedule!r}")
    if s.max_minutes is not None and not s.max_minutes > 0:
        raise CommandError(f"--max-minutes: expected a number above 0, got {s.max_minutes}")


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
