"""Loss and accuracy of a model on a split, and zero-shot accuracy without its prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Encoder
from .objectives import LogitsLoss
from .tasks import Example


@dataclass
class Scores:
    """Mean loss; with labels also accuracy and the words' logits (examples, words), on the CPU."""

    loss: float
    accuracy: float | None = None
    logits: Tensor | None = None

    def better_than(self, other: Scores) -> bool:
        """Higher accuracy, or the same at a lower loss; without accuracy, lower loss."""
        mine, theirs = self.accuracy or 0.0, other.accuracy or 0.0
        return mine > theirs or (mine == theirs and self.loss < other.loss)

    def summary(self) -> dict[str, Any]:
        """What metrics.json records."""
        scores = {"loss": self.loss, "accuracy": self.accuracy}
        return {name: value for name, value in scores.items() if value is not None}


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: LogitsLoss, encoder: Encoder, examples: Sequence[Example]
) -> Scores:
    """Scores on all examples, in batches of like length; the model is left in its mode.

    With an objective of label words: the mean over the examples. With one of token losses: the
    mean over all scored tokens of the split, so that exp(loss) is its perplexity and long texts
    count for what they hold. The model is expected in eval mode, as load_model leaves it.
    """
    if objective.tokens is None:
        total, count = 0.0, 0
        for _, batch in encoder.sorted_batches(examples):
            total += float(objective(model, batch).double().sum())
            count += int(objective.scored(batch).sum())
        return Scores(total / count)
    logits = torch.empty(len(examples), len(objective.tokens))
    for rows, batch in encoder.sorted_batches(examples):
        logits[rows] = objective.logits(model, batch)[:, 0].float().cpu()
    labels = torch.tensor([e.label for e in examples])
    accuracy = int((logits.argmax(1) == labels).sum()) / len(labels)
    return Scores(float(F.cross_entropy(logits, labels)), accuracy, logits)


def calibrated_accuracy(logits: Tensor, examples: Sequence[Example]) -> float:
    """Accuracy after the model's preference for some words is taken away.

    The median over the examples of each word's log-probability (among the words) is subtracted. It
    uses no label but does use the very texts that are scored, so it flatters zero-shot: what
    fine-tuning has to beat.
    """
    scores = logits.log_softmax(1)
    if scores.shape[1] == 2:  # the margin itself: its median splits the examples in halves
        scores = scores - scores.flip(1)
    scores = scores - scores.median(0).values
    labels = torch.tensor([e.label for e in examples])
    return int((scores.argmax(1) == labels).sum()) / len(labels)
