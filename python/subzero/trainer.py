"""``subzero train``: evaluate, train, keep the best on dev, test once, save."""

from __future__ import annotations

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
from .models import choose_trained, load_model
from .objectives import LabelWords, NextToken
from .optimizer import SubZero
from .settings import Settings
from .tasks import describe, make_task, word_ids

Objective = LabelWords | NextToken


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
    trained = choose_trained(
        model, settings.train_layers, settings.train_embeddings, settings.train_norms
    )
    check_output(output, settings.overwrite, needed=_bytes(model))
    optimizer = _optimizer(model, settings)
    objective = LabelWords(model, words) if words else NextToken(model)
    encoder = Encoder(loaded.tokenizer, model, settings.max_tokens)
    console.print(
        report.header(
            {
                "model": f"{loaded.label} ({settings.dtype}, {encoder.device})",
                "task": f"{task.name}: {describe(task, splits['train'])}",
                "data": f"{settings.data or task.data}: {len(splits['train'])} train, "
                f"{len(splits['dev'])} dev, {len(splits['test'])} test"
                + (f" ({duplicates} duplicates left out)" if duplicates else ""),
                "trained": trained,
                "plan": optimizer.plan().summary(),
            }
        )
    )

    with console.status("evaluating before training"):
        before = evaluate(objective, encoder, splits["test"])
    console.print(report.line("before: test", before), highlight=False)
    batches = TrainBatches(encoder, splits["train"], settings.batch_size, settings.seed)
    run = _Run(settings, optimizer, objective, model, console)
    run.train(batches, lambda: evaluate(objective, encoder, splits["dev"]))
    run.best.restore()
    optimizer.detach()
    with console.status("evaluating on test"):
        after = evaluate(objective, encoder, splits["test"])

    metrics: dict[str, Any] = {
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
        "skipped_steps": optimizer.skipped,
        "seconds": {"training": run.seconds, "total": time.perf_counter() - begin},
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


class _Best:
    """The trained weights of the best evaluation so far: only what requires grad is copied."""

    def __init__(self, model: torch.nn.Module, optimizer: SubZero) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.copies: list[torch.Tensor] = []
        self.step = -1
        self.scores = Scores(math.inf)

    def offer(self, step: int, scores: Scores) -> bool:
        """Keep the weights if these scores are better; the first always are."""
        if self.step >= 0 and not scores.better_than(self.scores):
            return False
        self.optimizer.fold()
        if self.copies:
            for copy, p in zip(self.copies, self.parameters, strict=True):
                copy.copy_(p.detach())
        else:
            self.copies = [p.detach().clone() for p in self.parameters]
        self.step, self.scores = step, scores
        return True

    def restore(self) -> None:
        """Put the kept weights back."""
        self.optimizer.fold()
        with torch.no_grad():
            for copy, p in zip(self.copies, self.parameters, strict=True):
                p.copy_(copy)


class _Run:
    """The training loop and its record."""

    def __init__(
        self,
        settings: Settings,
        optimizer: SubZero,
        objective: Objective,
        model: torch.nn.Module,
        console: Console,
    ) -> None:
        self.settings = settings
        self.optimizer = optimizer
        self.objective = objective
        self.console = console
        self.best = _Best(model, optimizer)
        self.losses: list[float] = []
        self.dev: list[dict[str, Any]] = []
        self.seconds = 0.0

    def train(self, batches: TrainBatches, evaluate_dev: Callable[[], Scores]) -> None:
        """All steps, with an evaluation on dev before, after, and every eval_every steps."""
        s = self.settings
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(s.schedule, s.steps))
        begin = time.perf_counter()
        with report.progress(self.console, s.steps) as bar:
            self._evaluate(evaluate_dev, bar)
            for batch in batches:
                bar.step_begins()
                loss = float(self.optimizer.step(batch, self.objective))
                scheduler.step()
                self.losses.append(loss)
                bar.step_ends(loss, batches.size)
                done = len(self.losses)
                late = s.max_minutes and time.perf_counter() - begin > 60 * s.max_minutes
                if late or done == s.steps or done % s.eval_every == 0:
                    self._evaluate(evaluate_dev, bar)
                if late and done < s.steps:
                    bar.say(f"stopped after step {done}: --max-minutes {s.max_minutes:g} is over")
                if late or done == s.steps:
                    break
        self.seconds = time.perf_counter() - begin
        if self.optimizer.skipped == len(self.losses):
            raise CommandError(
                "the loss was not finite in any step, so nothing was trained; "
                "try --dtype float32, or a smaller --eps or --lr",
                code=1,
            )

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
    for name in ("steps", "batch_size", "eval_every", "max_tokens"):
        if getattr(s, name) < 1:
            raise CommandError(
                f"--{name.replace('_', '-')}: expected at least 1, got {getattr(s, name)}"
            )
    if s.schedule not in ("cosine", "linear", "constant"):
        raise CommandError(f"--schedule: expected cosine, linear or constant, got {s.schedule!r}")
    if s.max_minutes is not None and not s.max_minutes > 0:
        raise CommandError(f"--max-minutes: expected a number above 0, got {s.max_minutes}")


def _optimizer(model: torch.nn.Module, s: Settings) -> SubZero:
    try:
        return SubZero(
            model, lr=s.lr, eps=s.eps, rank=s.rank, refresh_every=s.refresh_every,
            queries=s.queries, sides=s.sides, rule=s.rule, apply=s.apply, seed=s.seed,
            momentum=s.momentum, betas=(s.beta1, s.beta2), adam_eps=s.adam_eps,
            weight_decay=s.weight_decay, state_at_refresh=s.state_at_refresh,
            fold_rounding=s.fold_rounding, reshape=s.reshape,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise CommandError(f"optimizer: {error}") from error


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
