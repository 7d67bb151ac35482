"""How many ops a step dispatches beyond the plain forward: each is a launch on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import batch, build
from torch.utils._python_dispatch import TorchDispatchMode

from subzero import SubZero, label_words
from subzero.groups import repeat_batch

# Views and allocations launch nothing; the CPU alone reads whether a position is scored.
FREE = {
    "view", "t", "transpose", "unsqueeze", "expand", "slice", "select", "as_strided", "permute",
    "_unsafe_view", "detach", "split_with_sizes", "alias", "squeeze", "unbind", "split", "empty",
    "empty_like", "new_empty", "empty_strided", "lift_fresh", "promote_types",
    "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit",
    "unflatten", "_reshape_alias",
}  # fmt: skip
OBJECTIVE = label_words([5, 9])


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def beyond_the_forward(name: str, layers: int, queries: int) -> tuple[int, Counter[str]]:
    model = build(name, layers=layers).to(torch.bfloat16)
    given = {**batch(3, 6), "labels": torch.tensor([0, 1, 1])}
    opt = SubZero(model, rank=4, queries=queries)
    opt.step(given, OBJECTIVE)
    assert not opt.plan().one_by_one
    with Launches() as step:
        opt.step(given, OBJECTIVE)
    opt.detach()
    together = repeat_batch(given, 2 * queries)
    with torch.no_grad(), Launches() as bare:
        OBJECTIVE(model, together)
    return step.count.total() - bare.count.total(), step.count


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "gpt2", "mistral", "phi"])
def test_layers_cost_no_launch_more_than_the_models_own(name: str) -> None:
    """Each linear, norm and embedding is one op, whatever the number of groups."""
    few, _ = beyond_the_forward(name, 1, 1)
    more, count = beyond_the_forward(name, 3, 1)
    transposed = 8 if name == "gpt2" else 0  # Conv1D's core is turned round
    assert more - few <= transposed
    assert count["core_noise_"] == 2  # the cores of all groups, and the update


@pytest.mark.parametrize("queries", [1, 4])
def test_what_surrounds_the_model_is_a_few_dozen_launches(queries: int) -> None:
    beyond, count = beyond_the_forward("opt", 2, queries)
    assert beyond <= 50 + queries  # the dense values of a query are one launch
    assert count["perturb_dense_"] == queries + 1


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_a_norm_that_adds_one_to_its_weight_takes_all_groups_at_once(name: str) -> None:
    losses = []
    for together in (True, False):
        opt = SubZero(build(name), rank=4, eps=1e-2, queries=2, lr=1e-2)
        if not together:
            opt.plan().one_by_one = "for comparison"
        given = {**batch(3, 6), "labels": torch.tensor([0, 1, 1])}
        losses.append(torch.stack([opt.step(given, OBJECTIVE) for _ in range(3)]))
        assert bool(opt.plan().one_by_one) is not together
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
