"""Layers below the first trained one run once for all signs and queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_emulator import emulated  # noqa: F401 - a fixture
from tiny_models import batch, build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subzero import SubZero, label_words

NAMES = [
    "llama", "llama untied", "qwen2", "qwen2 sliding", "qwen3", "mistral", "opt", "gpt2", "phi",
    "phi3", "gemma", "gemma2", "gemma3", "gpt_neox", "bloom", "gptj", "olmo2",
]  # fmt: skip
LAYERS = 4
OBJECTIVE = label_words([5, 9])


def later_half(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(name, layers=LAYERS, dtype=dtype).requires_grad_(False)
    for block in blocks_of(model)[LAYERS // 2 :]:
        block.requires_grad_(True)
    return model


def blocks_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def given_batch(name: str, tokens: int = 12) -> dict[str, Tensor]:
    given = {**batch(3, tokens), "labels": torch.tensor([0, 1, 1])}
    if name in ("gemma2", "gemma3", "qwen2 sliding", "mistral", "phi3", "bloom"):
        del given["attention_mask"]  # they give NaN in padding: a window of 3 sees nothing else
    return given


def linear_flops(x: Any, w: Any, bias: Any, u: Any, v: Any, core: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (w[0] * w[1] + core[-1] * (w[0] + w[1] + core[-1]))


def flops(opt: SubZero, given: dict[str, Tensor]) -> int:
    opt.step(given, OBJECTIVE)
    counting = {torch.ops.subzero.lowrank_linear: linear_flops}
    with FlopCounterMode(display=False, custom_mapping=counting) as counter:
        opt.step(given, OBJECTIVE)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_nine_groups_of_the_later_half_cost_at_most_0_58_of_nine_whole_forwards(name: str) -> None:
    given = given_batch(name)
    # rank 1: of layers 32 wide the tail is as large a share as 64 of 2048
    half = SubZero(later_half(name), rank=1, eps=1e-2, queries=8, sides="one")
    assert half.plan().shared and flops(half, given) > 0
    shared = flops(half, given)
    assert not half.plan().one_by_one
    half._evaluator.shared._same_groups = lambda *_: False  # type: ignore[method-assign]
    assert shared <= 0.58 * flops(half, given)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "step") for name in NAMES]
    + [(name, "captured") for name in ("llama", "opt", "gpt2", "gemma", "bloom")],
)
def test_nothing_but_the_cost_changes(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    """Against group after group, each through the whole model, in float64."""
    if mode == "captured":
        request.getfixturevalue("emulated")
    given, losses, cores = given_batch(name, 7), [], []
    for together in (True, False):
        model = later_half(name, torch.float64)
        opt = SubZero(model, rank=2, eps=1e-2, lr=1e-2, queries=4, sides="one")
        if not together:
            opt.plan().one_by_one = "for comparison"
        run = opt.capture(given, OBJECTIVE) if mode == "captured" else None
        steps = [run(given) if run else opt.step(given, OBJECTIVE) for _ in range(3)]
        losses.append(torch.stack(steps))
        cores.append(torch.cat([space.value for _, space in opt._weights.spaces()]))
        assert bool(opt.plan().one_by_one) is not together
    assert losses[0].isfinite().all() and cores[0].any()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(cores[0], cores[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_each_lower_block_sees_one_group_and_each_later_one_all(name: str) -> None:
    model = later_half(name)
    seen: list[int] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    opt = SubZero(model, rank=2, eps=1e-2, queries=8, sides="one")
    opt.step(given_batch(name), OBJECTIVE)
    assert seen == [3, 3, 27, 27]


def test_caches_branch_too() -> None:
    """An objective that leaves use_cache on: each layer's cache has the rows that it saw."""
    model, sizes = later_half("llama"), []

    def objective(given: dict[str, Tensor]) -> Tensor:
        out = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        sizes.extend(len(layer.keys) for layer in out.past_key_values.layers)
        return F.cross_entropy(out.logits[:, -1], given["input_ids"][:, 0], reduction="none")

    opt = SubZero(model, rank=2, eps=1e-2, queries=2, sides="one")
    opt.step(given_batch("llama"), objective)
    assert sizes == [3, 3, 9, 9]
    assert not opt.plan().one_by_one
