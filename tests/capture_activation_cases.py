"""What the tests of captured steps of activation noise share: twins, batches, their comparison."""

from __future__ import annotations

from typing import Any

import torch
from capture_cases import assert_same, waiting_is_an_error
from tiny_models import batch, build
from torch import Tensor

from subzero import SubZero

FORMS = ["core", "right", "full"]
OPTIONS: dict[str, Any] = dict(
    noise="activation", lr=1e-2, eps=1e-2, rank=3, queries=3, seed=5, refresh_every=3
)
WORDS = [7, 11]


def twins(name: str, device: str, **options: Any) -> tuple[SubZero, SubZero]:
    dtype = options.pop("dtype", torch.float32)
    made = []
    for _ in range(2):
        model = build(name, dtype=dtype).to(device)
        for key, p in model.named_parameters():  # blocks below the first noisy one run once
            p.requires_grad_(not any(part in key for part in ("layers.0.", "h.0.")))
        made.append(SubZero(model, **{**OPTIONS, **options}))
    return made[0], made[1]


def data(count: int, device: str, tokens: int = 7) -> list[dict[str, Tensor]]:
    """Sentences padded on the left, with a class each."""
    made = []
    for i in range(count):
        b = batch(3, tokens, seed=10 + i)
        b["attention_mask"] = torch.ones_like(b["input_ids"])
        b["attention_mask"][1, :2] = 0
        b["labels"] = torch.tensor([i % 2, 0, 1])
        made.append({k: v.to(device) for k, v in b.items()})
    return made


def equal_steps(
    step: SubZero, captured: SubZero, batches: list[Any], objectives: Any, device: str
) -> None:
    """As many steps of both, of which only those that open a window or give V may wait."""
    run = captured.capture(batches[0], objectives[1])
    assert_same(step, captured)  # capturing makes no step
    for i, b in enumerate(batches):
        expected = step.step(b, objectives[0])
        reads = not captured._weights.ready or i % captured.options.refresh_every == 0
        with waiting_is_an_error("cpu" if reads else device):
            loss = run(b)
        assert torch.isfinite(loss) and torch.equal(loss, expected), i
        assert_same(step, captured)
