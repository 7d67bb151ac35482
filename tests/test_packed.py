"""Sequences without padding: the same losses and steps as padded, for the tokens there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_emulator import emulated  # noqa: F401 - a fixture
from test_shared_layers import linear_flops
from tiny_models import build
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from subzero import SubZero, label_words
from subzero.batches import pack

NAMES = [
    "llama", "llama untied", "qwen2", "qwen3", "mistral", "opt", "gpt2", "phi", "phi3", "gemma",
    "gemma2", "gemma3", "gpt_neox", "olmo2",
]  # fmt: skip
# Words of 16 sentences of SST-2's training set and 3 of the prompt: of batches drawn at random, one
# with the median share of padding.
SST2 = (19, 23, 22, 36, 6, 33, 9, 14, 17, 38, 7, 31, 22, 24, 20, 19)
WORDS = [5, 9]


def padded(lengths: tuple[int, ...] = (4, 7, 3, 7, 1), side: str = "left") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.randint(4, 96, (len(lengths), width), generator=generator)
    column = torch.arange(width)
    size = torch.tensor(lengths)[:, None]
    real = column >= width - size if side == "left" else column < size
    labels = torch.arange(len(lengths)) % 2
    positions = (real.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids * real,
        "attention_mask": real.long(),
        "position_ids": positions,
        "labels": labels,
    }


def alone(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Each example by itself, unpadded."""
    losses = []
    for ids, real, label in zip(
        given["input_ids"], given["attention_mask"].bool(), given["labels"], strict=True
    ):
        logits = model(input_ids=ids[real][None], use_cache=False).logits[0, -1, WORDS]
        losses.append(-logits.log_softmax(0)[label])
    return torch.stack(losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [None, 30])
def test_losses_are_those_of_each_example_alone(name: str, length: int | None) -> None:
    model, given = build(name, dtype=torch.float64), padded()
    packed = pack(given, length, torch.float64 if name == "opt" else None)
    assert packed["input_ids"].shape == (1, length or 22)
    with torch.no_grad():
        losses = label_words(WORDS, packed=5)(model, packed)
        torch.testing.assert_close(losses[0], alone(model, given), rtol=1e-7, atol=1e-7)


def test_a_model_that_would_not_tell_sequences_apart_is_refused() -> None:
    packed, objective = pack(padded()), label_words(WORDS, packed=5)
    with pytest.raises(ValueError, match="expected an attention mask .* for opt"):
        objective(build("opt"), packed)
    with pytest.raises(ValueError, match="expected one that takes position_ids"):
        objective(build("bloom"), packed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_packed(side: str) -> None:
    given = padded((2, 3, 1), side)
    packed = pack(given, 8)
    real = given["attention_mask"].bool()
    assert packed["input_ids"][0, :6].tolist() == given["input_ids"][real].tolist()
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    assert packed["labels"].tolist() == [[0, 1, 0]]
    scored = label_words(WORDS, packed=3).scored(packed)
    assert scored.tolist() == [[False, True, False, False, True, True, False, False]]
    with pytest.raises(ValueError, match="length: expected at least the 6 tokens"):
        pack(given, 5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("mode", ["step", "captured"])
def test_steps_are_those_of_the_padded_batch(
    name: str, mode: str, request: pytest.FixtureRequest
) -> None:
    if mode == "captured":
        request.getfixturevalue("emulated")
    losses, cores = [], []
    for packs in (False, True):
        given = padded((6, 6, 6) if name == "gemma3" else (4, 7, 3, 7, 1))
        objective = label_words(WORDS)
        if packs:
            objective = label_words(WORDS, packed=len(given["labels"]))
            given = pack(given, 24, torch.float64 if name == "opt" else None)
        elif name == "gemma3":
            del given["attention_mask"]
        opt = SubZero(build(name, dtype=torch.float64), rank=4, eps=1e-2, lr=1e-2, queries=2)
        run = opt.capture(given, objective) if mode == "captured" else None
        steps = [run(given) if run else opt.step(given, objective) for _ in range(3)]
        losses.append(torch.stack(steps))
        cores.append(torch.cat([space.value for _, space in opt._weights.spaces()]))
        assert not opt.plan().one_by_one
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(cores[0], cores[1], rtol=1e-6, atol=1e-9)


def test_a_step_costs_the_tokens_there_are() -> None:
    """Linears of 16 sentences of SST-2: 340 tokens instead of 608."""
    assert (sum(SST2), 16 * max(SST2)) == (340, 608)
    found = []
    for packs in (False, True):
        given = padded(SST2)
        objective = label_words(WORDS, packed=16 if packs else None)
        given = pack(given) if packs else given
        opt = SubZero(build("llama"), rank=2, eps=1e-2)
        counting = {torch.ops.subzero.lowrank_linear: linear_flops}
        opt.step(given, objective)
        with FlopCounterMode(display=False, custom_mapping=counting) as counter:
            opt.step(given, objective)
        found.append(counter.get_flop_counts()["Global"][torch.ops.subzero.lowrank_linear])
    assert found[1] * 16 * max(SST2) == found[0] * sum(SST2)
