"""Saving, resuming and copying: bit for bit, in whatever order things are read."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tiny_models import batch, build, closure, per_example, same_bits, snapshot
from torch import nn

from subzero import SubZero

RULES = [dict(rule="sgd"), dict(rule="momentum"), dict(rule="adam"), dict(rule="norm", queries=4)]
BASE = dict(lr=1e-2, eps=1e-2, rank=4, refresh_every=3, weight_decay=0.1, seed=11)


def resumed(
    model: nn.Module, state: dict[str, Any], weights: dict[str, Any], **options: Any
) -> tuple:
    fresh = build("llama", seed=5, dtype=next(model.parameters()).dtype)
    opt = SubZero(fresh, **options)
    fresh.load_state_dict(weights)
    opt.load_state_dict(state)
    return fresh, opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply", ["forward", "in_place"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["rule"])
@pytest.mark.parametrize("model_first", [True, False])
def test_resume_is_bit_for_bit(
    rule: dict, apply: str, dtype: torch.dtype, model_first: bool
) -> None:
    options = dict(BASE, apply=apply, **rule)
    b = batch()
    model = build("llama", dtype=dtype)
    opt = SubZero(model, **options)
    for _ in range(4):  # into the second window
        opt.step(b, per_example(model))
    if model_first:
        weights, state = model.state_dict(), opt.state_dict()
    else:
        state, weights = opt.state_dict(), model.state_dict()
    file = io.BytesIO()  # through a file, as a user would: no live references
    torch.save((weights, state), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, again = resumed(model, state, weights, **options)
    for _ in range(4):  # across the next refresh
        assert torch.equal(opt.step(b, per_example(model)), again.step(b, per_example(other)))
    opt.fold()
    again.fold()
    assert same_bits(other, snapshot(model))
    assert (opt.steps, opt.draws, opt.window) == (again.steps, again.draws, again.window)


def test_state_holds_plain_values_and_survives_further_steps() -> None:
    model, b = build("llama"), batch()
    opt = SubZero(model, **BASE, rule="momentum")
    opt.step(closure(model, b))
    state = opt.state_dict()
    kept = copy.deepcopy(state)
    opt.step(closure(model, b))
    for name, tensor in kept["tensors"].items():
        assert torch.equal(tensor, state["tensors"][name])


def test_model_state_dict_is_folded_and_complete() -> None:
    model, b = build("llama"), batch()
    names = list(model.state_dict())
    before = snapshot(model)
    opt = SubZero(model, **BASE)
    opt.step(closure(model, b))
    assert same_bits(model, before)
    part = model.model.layers[0].state_dict()  # a part is enough to fold
    assert not torch.equal(part["mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    saved = model.state_dict()
    assert list(saved) == names
    plain = build("llama", seed=9)
    plain.load_state_dict(saved)
    with torch.no_grad():
        torch.testing.assert_close(per_example(plain)(b), per_example(model)(b))


def test_copies_of_the_model_are_plain_models_with_folded_weights() -> None:
    model, b = build("llama"), batch()
    opt = SubZero(model, **{**BASE, "weight_decay": 0.0})  # W's own decay comes at the fold
    opt.step(closure(model, b))
    with torch.no_grad():
        tuned = per_example(model)(b)
        twin = copy.deepcopy(model)
        opt.step(closure(model, b))  # the original goes on, the copy stays
        torch.testing.assert_close(per_example(twin)(b), tuned)
        file = io.BytesIO()
        now = per_example(model)(b)
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        torch.testing.assert_close(per_example(loaded)(b), now)
    SubZero(twin, **BASE).step(closure(twin, b))  # and it can be trained itself


def test_a_copied_root_parameter_is_folded_too() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    x = torch.randn(4, 6)
    opt = SubZero(model, lr=0.1, rank=2)
    opt.step(lambda: model(x).square().mean())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    assert twin.weight.data_ptr() != model.weight.data_ptr()


def test_loading_weights_from_outside_starts_from_them() -> None:
    model, b = build("llama"), batch()
    start = copy.deepcopy(model.state_dict())
    opt = SubZero(model, **BASE)
    opt.step(closure(model, b))
    model.load_state_dict(start)
    with torch.no_grad():
        torch.testing.assert_close(per_example(model)(b), per_example(build("llama"))(b))
    opt.fold()
    assert same_bits(model, snapshot(build("llama")))
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict(start, assign=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("counters"), "counters"),
        (lambda s: s.update(contract=99), "contract"),
        (lambda s: s["options"].update(rank=5), "rank"),
        (lambda s: s["options"].update(seed=5), "seed"),
        (lambda s: s["parameters"].pop(), "trained parameters"),
        (lambda s: s["parameters"][1].__setitem__(0, "other.weight"), "other.weight"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr"),
        (lambda s: s["tensors"].update({"core.momentum": torch.zeros(3)}), "core.momentum"),
        (lambda s: s["tensors"].pop("dense.value"), "expected the tensor dense.value"),
    ],
)
def test_a_foreign_state_changes_nothing(change: Any, message: str) -> None:
    model, b = build("llama"), batch()
    opt = SubZero(model, **BASE, rule="momentum")
    opt.step(closure(model, b))
    state = copy.deepcopy(opt.state_dict())
    change(state)
    before = copy.deepcopy(opt.state_dict())
    weights = snapshot(model)
    with pytest.raises((ValueError, KeyError), match=message):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["counters"] == before["counters"] and same_bits(model, weights)
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name])
