"""torch.compile(model, fullgraph=True) with the side path attached: one graph, the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from tiny_models import batch, build
from torch import Tensor

from subzero import SubZero, label_words, next_token
from subzero.batches import pack

KINDS = ["own", "own, apart", "label words", "next token"]
CASES = [(name, kind) for name in ("llama", "opt") for kind in KINDS]
CASES += [(name, "label words") for name in ("gpt2", "qwen3", "gemma", "phi", "mistral")]
OPTIONS: dict[str, Any] = dict(rank=4, eps=1e-2, lr=1e-2, queries=2)


def sound(name: str) -> torch.nn.Module:
    model = build(name, dtype=torch.float64)
    model.config.use_cache = False
    return model


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """Without padding, which a compiled model of transformers reads from the mask."""
    return [
        {"input_ids": batch(3, 6, seed=i)["input_ids"], "labels": torch.tensor([i % 2, 1, 0])}
        for i in range(count)
    ]


def objective_of(kind: str, model: Any) -> Any:
    if kind == "label words":
        return label_words([5, 9])
    if kind == "next token":
        return next_token()

    def last_token(given: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=given["input_ids"]).logits[:, -1]
        return F.cross_entropy(logits, given["input_ids"][:, 0], reduction="none")

    return last_token


def steps(opt: SubZero, objective: Any, given: list[dict[str, Tensor]], apart: bool) -> Tensor:
    if not apart:
        return torch.stack([opt.step(one, objective) for one in given])
    return torch.stack([opt.step(lambda one=one: objective(one).mean()) for one in given])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_graph_for_all_steps(name: str, kind: str) -> None:
    """No break (fullgraph raises), no recompile, and bit for bit what the plain model does."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    found = []
    for compiles in (False, True):
        model = sound(name)
        opt = SubZero(model, **OPTIONS)
        if compiles:
            model.compile(fullgraph=True, backend=counter)
        objective = objective_of(kind.partition(",")[0], model)
        given = batches()
        losses = steps(opt, objective, given[:2], "apart" in kind)
        settled = counter.frame_count
        losses = torch.cat([losses, steps(opt, objective, given[2:], "apart" in kind)])
        found.append(torch.cat([losses, opt._weights.cores.value]))  # type: ignore[union-attr]
    assert settled == counter.frame_count == 1
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_compiled_model_traces_for_aot_autograd(name: str) -> None:
    """The ops have fakes, and nothing that is traced writes where it must not."""
    torch._dynamo.reset()
    found = []
    for backend in (None, "aot_eager"):
        model = sound(name)
        opt = SubZero(model, **OPTIONS)
        if backend:
            model.compile(fullgraph=True, backend=backend)
        found.append(steps(opt, label_words([5, 9]), batches(), False))
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def later_layer() -> torch.nn.Module:
    model = sound("llama").requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    return model


def test_shared_layers_compile_too() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    found = []
    for compiles in (False, True):
        model = later_layer()
        opt = SubZero(model, **OPTIONS)
        if compiles:
            model.compile(fullgraph=True, backend=counter)
        found.append(steps(opt, label_words([5, 9]), batches(), False))
    assert torch.equal(*found)
    assert counter.frame_count == 1


def test_a_compiled_lower_layer_sees_one_group() -> None:
    torch._dynamo.reset()
    model, rows = later_layer(), []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    opt = SubZero(model, **OPTIONS)
    model.compile(fullgraph=True, backend="eager")
    opt.step(batches()[0], label_words([5, 9]))
    assert rows == [3, 12]


def test_packed_batches_compile_too() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    found = []
    for compiles in (False, True):
        model = sound("llama")
        opt = SubZero(model, **OPTIONS)
        if compiles:
            model.compile(fullgraph=True, backend=counter)
        given = [pack(one) for one in batches()]
        found.append(steps(opt, label_words([5, 9], packed=3), given, False))
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)
    assert counter.frame_count == 1


def test_between_steps_the_compiled_model_shows_what_was_learned() -> None:
    torch._dynamo.reset()
    model = sound("llama")
    opt = SubZero(model, **OPTIONS)
    given = batches()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one in given:
        opt.step(one, label_words([5, 9]))
        with torch.no_grad():
            shown = compiled(input_ids=one["input_ids"]).logits
            want = model(input_ids=one["input_ids"]).logits
        assert torch.equal(shown, want)
