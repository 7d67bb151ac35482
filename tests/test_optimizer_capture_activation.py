"""Captured steps of activation noise: the step, bit for bit, whole groups and rows.

As in test_optimizer_capture.py, on a CPU also with graphs that replay ops on the same memory.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from capture_activation_cases import FORMS, OPTIONS, WORDS, data, equal_steps, twins
from capture_cases import (
    RULES,
    assert_same,
    device_fixture,  # noqa: F401
    emulated,  # noqa: F401
    on_devices,
    tensors,
    waiting_is_an_error,
)
from tiny_models import build, per_example, same_bits, snapshot
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero, label_words, next_token


def by_example(model: nn.Module) -> Any:
    plain = per_example(model)
    return lambda b: plain({k: v for k, v in b.items() if k != "labels"})


# the captured step is the step


@on_devices
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_captured_equals_uncaptured_across_windows(device: str, rule: str, form: str) -> None:
    keep = "keep" if rule in ("muon", "adam") else "reset"
    step, captured = twins("llama", device, rule=rule, form=form, state_at_refresh=keep)
    equal_steps(step, captured, data(7, device), [label_words(WORDS)] * 2, device)
    assert not captured.plan().whole_groups
    for opt in (step, captured):
        opt.fold()
    assert_same(step, captured)
    assert not same_bits(captured.model, snapshot(build("llama").to(device)))


@on_devices
@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_architecture_is_captured(
    device: str, form: str, dtype: torch.dtype, name: str
) -> None:
    step, captured = twins(name, device, dtype=dtype, form=form, rule="muon", lr=0.1)
    equal_steps(step, captured, data(5, device), [label_words(WORDS)] * 2, device)
    assert bool(captured.plan().whole_groups) == (name == "bert")
    with torch.no_grad():
        b = {k: v for k, v in data(1, device)[0].items() if k != "labels"}
        assert torch.equal(captured.model(**b).logits, step.model(**b).logits)


@on_devices
@pytest.mark.parametrize("where", ["loss", "all"])
@pytest.mark.parametrize("kind", ["words", "next", "scattered", "plain", "plain tokens", "micro"])
def test_every_kind_of_objective_is_captured(device: str, kind: str, where: str) -> None:
    step, captured = twins(
        "llama", device, where=where, rule="norm", form="core", discount=0.5, credit="own"
    )
    batches: list[Any] = data(5, device)
    objectives: list[Any] = [label_words(WORDS)] * 2
    if kind == "next":
        objectives = [next_token()] * 2
    elif kind == "scattered":
        objectives = [LogitsLoss(lambda x, b: x.float().sin().mean(-1), some_positions)] * 2
    elif kind == "plain":
        objectives = [by_example(opt.model) for opt in (step, captured)]
    elif kind == "plain tokens":
        objectives = [by_token(opt.model) for opt in (step, captured)]
    elif kind == "micro":
        objectives = [next_token()] * 2
        other = data(5, device, tokens=5)
        batches = [[b, o] for b, o in zip(batches, other, strict=True)]
    for b in batches if kind in ("next", "plain tokens") else []:
        b["labels"] = b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)
    for b in batches if kind == "plain" and where == "loss" else []:
        b["labels"] = b["input_ids"]
    equal_steps(step, captured, batches, objectives, device)
    rows = where == "loss" and not kind.startswith("plain")
    assert bool(captured.plan().whole_groups) == (where == "all") or not rows


def by_token(model: nn.Module) -> Any:
    def loss(b: dict[str, Tensor]) -> Tensor:
        return model(**{k: v for k, v in b.items() if k != "labels"}).logits.float().logsumexp(-1)

    return loss


def some_positions(b: dict[str, Tensor]) -> Tensor:
    mask = torch.zeros_like(b["input_ids"], dtype=torch.bool)
    for part in (mask[:, 2], mask[0, 4], mask[2, 5]):
        part.fill_(True)  # assigning would copy a number of the CPU's
    return mask


@on_devices
def test_an_encoder_decoder_is_captured(device: str) -> None:
    models = [build("t5").to(device) for _ in range(2)]
    step, captured = (
        SubZero(model, **{**OPTIONS, "where": "all", "rule": "muon"}) for model in models
    )
    batches = data(5, device)
    for b in batches:
        b["labels"] = b["input_ids"][:, :4].contiguous()
    equal_steps(step, captured, batches, [next_token()] * 2, device)


@on_devices
def test_bases_may_be_known_before(device: str) -> None:
    """With bases from data the first replay is the first step, and waits for nothing."""
    step, captured = twins("llama", device, rule="norm", refresh_every=100)
    batches = data(4, device)
    for opt in (step, captured):
        opt.bases_from(batches[3], label_words(WORDS))
    run = captured.capture(batches[0], label_words(WORDS))
    for b in batches:
        with waiting_is_an_error(device):
            loss = run(b)
        assert torch.equal(loss, step.step(b, label_words(WORDS)))
    assert_same(step, captured)


@on_devices
def test_several_shapes_share_one_pool(device: str) -> None:
    step, captured = twins("llama", device, rule="muon", form="core")
    short, long = data(6, device, tokens=5), data(6, device, tokens=9)
    runs = [captured.capture(b[0], label_words(WORDS)) for b in (short, long)]
    if runs[0].graph is not None:
        assert captured._graph_memory is not None
    for i in range(6):
        b = (short, long)[i % 2][i]
        assert torch.equal(runs[i % 2](b), step.step(b, label_words(WORDS)))
        assert_same(step, captured)


# what may happen between calls


@on_devices
@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_and_new_numbers_take_effect(device: str, form: str) -> None:
    """Weight decay too, which form full makes a new graph for."""
    step, captured = twins("llama", device, rule="adam", form=form, refresh_every=100)
    batches = data(8, device)
    run = captured.capture(batches[0], label_words(WORDS))
    for i, b in enumerate(batches):
        for opt in (step, captured):
            group = opt.param_groups[0]
            group["lr"] = 1e-2 / (i + 1)
            if i == 3:
                group.update(eps=3e-3, betas=(0.8, 0.95), weight_decay=0.3)
            if i == 6:
                group.update(weight_decay=0.0, adam_eps=1e-6)
        assert torch.equal(run(b), step.step(b, label_words(WORDS)))
        assert_same(step, captured)


@on_devices
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_loss_that_is_not_finite_skips_the_step(device: str, rule: str, form: str) -> None:
    step, captured = twins("llama", device, rule=rule, form=form, weight_decay=0.1)
    batches = data(4, device)
    for i, b in enumerate(batches):
        b["scale"] = torch.full((3,), math.nan if i == 2 else 1.0, device=device)

    def fn(logits: Tensor, b: dict[str, Tensor]) -> Tensor:
        return label_words(WORDS).fn(logits, b) * b["scale"]

    objective = LogitsLoss(fn, label_words(WORDS).positions, tokens=WORDS, width=1)
    run = captured.capture(batches[0], objective)
    for b in batches[:2]:
        run(b)
    before = {k: v.clone() for k, v in tensors(captured).items()}
    assert not torch.isfinite(run(batches[2]))
    assert captured.skipped == 1 and captured.steps == 3
    for name, value in tensors(captured).items():
        if name not in ("rng", "skipped"):
            assert torch.equal(value, before[name]), name
    run(batches[3])
    for b in batches:
        step.step(b, objective)
    assert_same(step, captured)


@on_devices
def test_a_first_step_that_is_skipped_leaves_the_bases_unknown(device: str) -> None:
    step, captured = twins("llama", device, rule="norm", form="core")
    batches = data(4, device)
    objective = LogitsLoss(
        lambda x, b: x.float().sin().mean((1, 2)) * b["scale"], some_positions, width=2
    )
    for i, b in enumerate(batches):
        b["scale"] = torch.full((3,), math.inf if i == 0 else 1.0, device=device)
    run = captured.capture(batches[1], objective)
    run(batches[0])
    assert not captured._weights.ready and captured.skipped == 1
    step.step(batches[0], objective)
    for b in batches[1:]:
        assert torch.equal(run(b), step.step(b, objective))
        assert_same(step, captured)


@on_devices
@pytest.mark.parametrize("form", FORMS)
def test_a_state_loads_into_captured_steps_and_continues(device: str, form: str) -> None:
    step, captured = twins("llama", device, rule="muon", form=form)
    batches, objective = data(8, device), label_words(WORDS)
    run = captured.capture(batches[0], objective)
    for b in batches[:2]:
        step.step(b, objective)
        run(b)
    weights = {k: v.clone() for k, v in step.model.state_dict().items()}
    state = step.state_dict()
    for b in batches[2:5]:
        run(b)  # runs ahead, into another window
    captured.model.load_state_dict(weights)
    captured.load_state_dict(state)
    for b in batches[2:]:
        assert torch.equal(run(b), step.step(b, objective))
    assert_same(step, captured)
    assert captured.state_dict()["tensors"].keys() == step.state_dict()["tensors"].keys()


@on_devices
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_and_runs_may_alternate(device: str, form: str, name: str) -> None:
    """And the model, its folds and its whole groups may be used between them."""
    step, captured = twins(name, device, rule="momentum", form=form)
    batches, objective = data(8, device), label_words(WORDS)
    run = captured.capture(batches[0], objective)
    for i, b in enumerate(batches):
        expected = step.step(b, objective)
        assert torch.equal(captured.step(b, objective) if i % 2 else run(b), expected)
        if i == 4:
            for opt in (step, captured):
                opt.fold()
                opt.evaluate_whole_groups("as the test asks")
        inputs = {k: v for k, v in b.items() if k != "labels"}
        with torch.no_grad():
            assert torch.equal(captured.model(**inputs).logits, step.model(**inputs).logits)
    assert_same(step, captured)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_graph_reads_stays_where_it_is(name: str, rule: str, form: str) -> None:
    opt, _ = twins(name, "cpu", rule=rule, form=form, refresh_every=2)
    objective = label_words(WORDS)

    def places() -> dict[str, int]:
        found = tensors(opt)
        for low in opt._weights.side.matrices.values():
            found |= {f"{low.entry.name} {i}": t for i, t in enumerate((low.u, low.v, low.core))}
        return {name: value.data_ptr() for name, value in found.items()}

    batches = data(6, "cpu")
    opt.step(batches[0], objective)
    before = places()
    for b in batches[1:]:
        opt.step(b, objective)
    opt.load_state_dict(opt.state_dict())
    opt.step(batches[0], objective)
    assert places() == before
