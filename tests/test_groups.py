"""Repeating a batch for all groups: what is repeated, expanded, and left alone."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from transformers import BatchEncoding

from subzero.groups import SharedPrefix, batch_size, repeat_batch
from subzero.hooks import Hooks


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_batch_tensors_repeat_group_major_and_the_rest_stays() -> None:
    ids = torch.arange(6).view(3, 2)
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([0, 1, 2]),
        "position_ids": torch.tensor([[7, 8]]),
        "class_weights": torch.ones(5),
        "temperature": torch.tensor(2.0),
        "names": ["a", "b", "c"],
        "nested": (Pair(ids, ids + 1), [ids + 2]),
    }
    kept = copy.deepcopy(batch)
    out = repeat_batch(batch, 2)
    assert torch.equal(out["input_ids"], torch.cat([ids, ids]))
    assert torch.equal(out["labels"], torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(out["position_ids"], torch.tensor([[7, 8]]).expand(6, 2))
    assert out["class_weights"].shape == (5,) and out["temperature"].dim() == 0
    assert out["names"] == ["a", "b", "c"]
    pair, rest = out["nested"]
    assert isinstance(pair, Pair) and torch.equal(pair.y, torch.cat([ids, ids]) + 1)
    assert isinstance(rest, list) and rest[0].shape == (6, 2)
    assert torch.equal(batch["input_ids"], kept["input_ids"]) and len(batch) == len(kept)


def test_other_mappings_keep_their_type() -> None:
    out = repeat_batch(BatchEncoding({"input_ids": torch.ones(2, 3)}), 3)
    assert isinstance(out, BatchEncoding) and out["input_ids"].shape == (6, 3)


@pytest.mark.parametrize(
    "batch, size",
    [
        (torch.ones(4, 2), 4),
        ({"position_ids": torch.ones(1, 9), "input_ids": torch.ones(1, 9)}, 1),
        ({"position_ids": torch.ones(1, 9), "x": torch.ones(3, 9)}, 3),
        ((torch.tensor(1.0), torch.ones(2)), 2),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


def test_a_square_mask_as_long_as_the_rows_is_not_taken_for_a_batch() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.seen: list[tuple[int, ...]] = []

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            self.seen += [tuple(x.shape), tuple(mask.shape)]
            return self.linear(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1]).tril()
            for block in self.blocks:
                x = block(x, mask)
            return x

    model = Model()
    hooks = Hooks(lambda memo: None)
    shared = SharedPrefix(model, {id(p) for p in model.blocks[1].parameters()}, hooks)
    shared.groups, shared.rows = 2, 6
    x = torch.randn(3, 6, 4).repeat(2, 1, 1)  # 6 tokens, 6 rows: the mask has 6 rows as well
    y = model(x)
    assert model.blocks[0].seen == [(6, 6, 4), (6, 6)]
    assert y.shape == (6, 6, 4)
    short = torch.randn(3, 5, 4).repeat(2, 1, 1)
    assert torch.allclose(model(short), torch.cat([model(short[:3])] * 2))
    assert model.blocks[0].seen[2:4] == [(3, 5, 4), (5, 5)]
    hooks.remove()
    assert not model.blocks[0]._forward_pre_hooks


def test_groups_that_differ_below_are_not_shared() -> None:
    model = build("llama")
    hooks = Hooks(lambda memo: None)
    shared = SharedPrefix(model, {id(p) for p in model.model.layers[1].parameters()}, hooks)
    ids = torch.randint(0, 96, (4, 5))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        shared.groups, shared.rows = 2, 4
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
        same = ids[:2].repeat(2, 1)
        together = model(input_ids=same).logits
    torch.testing.assert_close(together, plain[:2].repeat(2, 1, 1))
