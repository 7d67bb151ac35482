"""One run of the study: train at a budget, keep what was best on dev, score once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Data, load
from methods import METHODS, Method, Stepper

from subzero import LogitsLoss, label_words, next_token
from subzero.batches import Encoder, TrainBatches
from subzero.models import load_model
from subzero.tasks import Example, word_ids

MAX_TOKENS = 256
CHECKPOINTS = 5  # evaluations on dev, at equal parts of the budget
Record = dict[str, Any]


def key(job: Record) -> str:
    """What makes two jobs the same."""
    names = ("task", "method", "budget", "seed", "test")
    return repr([job[n] for n in names] + sorted(job["choice"].items()))


class Bench:
    """A model and tasks in memory; every run starts from the same weights."""

    def __init__(self, model: str, data: Path, device: str, dtype: str = "float32") -> None:
        torch.set_float32_matmul_precision("high")  # TF32 products on a GPU
        self.loaded = load_model(model, dtype, device)
        self.model = self.loaded.model
        fuse_norms(self.model)
        self.folder = data
        self.tasks: dict[str, Data] = {}
        self.pristine = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.encoder = Encoder(self.loaded.tokenizer, self.model, MAX_TOKENS)

    def data(self, task: str) -> Data:
        """The task's examples, read once."""
        if task not in self.tasks:
            self.tasks[task] = load(task, self.folder)
        return self.tasks[task]

    def stepper(self, job: Record, method: Method | None = None) -> Stepper:
        """The job's method on the pristine model."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.pristine[name])
        objective = self.objective(self.data(job["task"]))
        method = method or METHODS[job["method"]]
        return Stepper(method, dict(job["choice"]), self.model, objective, job["seed"])

    def run(self, job: Record) -> Record:
        """Train and score; the record of a results file."""
        stepper = self.stepper(job)
        try:
            return self._train(job, stepper)
        finally:
            stepper.close()
            del stepper
            if torch.cuda.is_available():  # other processes share the device
                torch.cuda.empty_cache()

    def _train(self, job: Record, stepper: Stepper) -> Record:
        data = self.data(job["task"])

        def batches() -> Iterator[dict[str, torch.Tensor]]:
            return iter(TrainBatches(self.encoder, data.train, stepper.batch, job["seed"]))

        source = batches()
        spent, steps, seconds = stepper.align(source), 0, 0.0
        loss = torch.full((), math.nan)
        best: tuple[tuple[float, float], float, list[torch.Tensor]] | None = None
        for part in range(1, CHECKPOINTS + 1):
            if stepper.begin_part((part - 1) / (CHECKPOINTS - 1)):
                source = batches()
            begin = time.perf_counter()
            while spent < job["budget"] * part / CHECKPOINTS:
                stepper.set_lr(0.5 * (1 + math.cos(math.pi * spent / job["budget"])))
                loss, cost = stepper.step(next(source))
                spent += cost
                steps += 1
            last = float(loss)
            seconds += time.perf_counter() - begin
            scores = self.score(stepper.model, stepper.objective, data.dev)
            value = scores.get("accuracy", 0.0), -scores["loss"]
            if best is None or value > best[0]:
                best = value, spent, stepper.weights() if job["test"] else []
        assert best is not None
        record = job | dict(
            steps=steps, cost=round(spent, 2), seconds=round(seconds, 3), loss=last,
            skipped=stepper.skipped, best_at=round(best[1], 1), dev_accuracy=best[0][0],
            dev_loss=-best[0][1], end_accuracy=value[0], end_loss=-value[1],
            device=device_name(self.encoder.device), torch=torch.__version__,
            date=time.strftime("%Y-%m-%d"),
        )  # fmt: skip
        if job["test"]:
            stepper.restore(best[2])
            scores = self.score(stepper.model, stepper.objective, data.test)
            record |= {f"test_{name}": score for name, score in scores.items()}
        return record

    def objective(self, data: Data) -> LogitsLoss:
        """Label words, or next tokens where the task has no labels."""
        if not data.task.words:
            return next_token()
        return label_words(word_ids(data.task, self.loaded.tokenizer))

    @torch.no_grad()
    def score(
        self, model: torch.nn.Module, objective: LogitsLoss, examples: list[Example]
    ) -> dict[str, float]:
        """Mean loss (per token for language modelling) and, with labels, accuracy."""
        total, right, counts = 0.0, 0.0, 0
        tokens = 16384 if objective.tokens else 2048  # all logits of a token are 200 kB
        for rows, batch in self.encoder.sorted_batches(examples, tokens):
            if objective.tokens is None:
                total += float(objective(model, batch).sum())
                counts += int(objective.scored(batch).sum())
                continue
            logits = objective.logits(model, batch)
            total += float(objective.fn(logits, batch).sum())
            right += int((logits[:, 0].argmax(1) == batch["labels"]).sum())
            counts += len(rows)
        loss = {"loss": total / counts}
        return loss if objective.tokens is None else loss | {"accuracy": right / counts}


def device_name(device: torch.device) -> str:
    """What a results file says a run was on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fuse_norms(model: torch.nn.Module) -> None:
    """Torch's own RMSNorm in place of the model's six kernels: the study is bound by launches."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            weight, eps = module.weight, module.variance_epsilon
            norm = functools.partial(
                F.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=eps
            )
            module.forward = norm
