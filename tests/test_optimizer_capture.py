"""``run = opt.capture(batch, objective)``: the captured step is the step, bit for bit.

On a CPU, which has no graphs, ``run`` is the step itself; graph_emulator.py makes graphs there that
replay ops on the same memory. What they rely on is seen too: every tensor that outlives a step
stays where it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_cases import (
    OPTIONS,
    RULES,
    assert_same,
    batches,
    device_fixture,  # noqa: F401
    emulated,  # noqa: F401
    on_devices,
    tensors,
    twins,
    waiting_is_an_error,
)
from tiny_models import batch, per_example
from torch import Tensor, nn

from subzero import SubZero, label_words, next_token

# the captured step is the step


@on_devices
@pytest.mark.parametrize("apply", ["forward", "in_place"])
@pytest.mark.parametrize("rule", RULES)
def test_captured_equals_uncaptured_across_windows_and_a_fold(
    device: str, rule: str, apply: str, request: pytest.FixtureRequest
) -> None:
    step, captured = twins("llama", device, rule=rule, apply=apply)
    data = batches(8, device)
    run = captured.capture(data[0], per_example(captured.model))
    assert (run.graph is None) == ("emulated" not in request.node.name and device == "cpu")
    assert_same(step, captured)  # capturing makes no step
    for i, b in enumerate(data):  # windows open at the fourth and the seventh
        expected = step.step(b, per_example(step.model))
        with waiting_is_an_error(device):
            loss = run(b)
        assert torch.equal(loss, expected), i
        if i == 4:
            step.fold()
            captured.fold()
        assert_same(step, captured)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3", "t5", "bert"])
def test_every_architecture_is_captured(device: str, name: str, dtype: torch.dtype) -> None:
    step, captured = twins(name, device, dtype=dtype, sides="one", rule="momentum")
    data = batches(5, device)
    run = captured.capture(data[0], per_example(captured.model))
    for b in data:
        expected = step.step(b, per_example(step.model))
        with waiting_is_an_error(device):
            loss = run(b)
        assert torch.equal(loss, expected)
    assert_same(step, captured)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_a_mask_takes_the_causal_kernel_in_both(
    device: str, dtype: torch.dtype
) -> None:
    step, captured = twins("llama", device, dtype=dtype)
    for opt in (step, captured):
        opt.model.config.use_cache = False  # with a cache transformers does not look for packing
    data = [{"input_ids": b["input_ids"]} for b in batches(4, device, tokens=24)]
    run = captured.capture(data[0], per_example(captured.model))
    for b in data:
        assert torch.equal(run(b), step.step(b, per_example(step.model)))
    assert_same(step, captured)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("packs", [False, True])
def test_a_mask_is_built_only_where_sequences_may_be_packed(packs: bool) -> None:
    opt, _ = twins("llama", "cpu")
    opt.model.config.use_cache = False  # with a cache transformers does not look for packing
    masks: list[bool] = []
    layer = opt.model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"] is not None),
        with_kwargs=True,
    )
    b = {"input_ids": batch()["input_ids"]}
    if packs:
        b["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 3)
    opt.capture(b, per_example(opt.model))
    assert masks and set(masks) == {packs}


@on_devices
@pytest.mark.parametrize("kind", ["micro-batches", "words", "next", "next at", "labels"])
def test_every_kind_of_objective_is_captured(device: str, kind: str) -> None:
    # a fold reads the product of the decays; no window ends here
    step, captured = twins("llama", device, rule="momentum", weight_decay=0.1, refresh_every=100)
    data: list[Any] = batches(5, device)
    objectives: list[Any] = [per_example(opt.model) for opt in (step, captured)]
    masks: list[Any] = [None] * len(data)
    if kind == "micro-batches":
        data = [[b, batches(6, device, tokens=5)[5]] for b in data]
    elif kind == "words":
        objectives = [label_words([7, 11])] * 2
        for i, b in enumerate(data):
            b["labels"] = torch.tensor([i % 2, 0, 1], device=device)
    elif kind == "next":
        objectives = [next_token()] * 2
    elif kind == "next at":
        objectives = [next_token()] * 2
        masks = [b["attention_mask"].bool() for b in data]
        for mask in masks:
            mask[:, :4] = False
    else:
        objectives = [token_losses(opt.model) for opt in (step, captured)]
        for b in data:
            b["labels"] = b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)
    run = captured.capture(data[0], objectives[1], masks[0])
    for b, mask in zip(data, masks, strict=True):
        expected = step.step(b, objectives[0], mask)
        with waiting_is_an_error(device):
            loss = run(b, mask)
        assert torch.isfinite(loss) and torch.equal(loss, expected)
    assert_same(step, captured)


def token_losses(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(b: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in b.items() if k != "labels"}
        return model(**inputs).logits.float().logsumexp(-1)

    return loss


@on_devices
def test_lower_layers_run_once_in_a_captured_step_too(device: str) -> None:
    step, captured = twins("llama", device)
    for opt in (step, captured):
        opt.detach()
    models = [opt.model.requires_grad_(False) for opt in (step, captured)]
    for model in models:
        model.model.layers[1].requires_grad_(True)
    step, captured = (SubZero(model, **OPTIONS) for model in models)
    assert captured.plan().shared
    data = batches(4, device)
    run = captured.capture(data[0], per_example(captured.model))
    for b in data:
        assert torch.equal(run(b), step.step(b, per_example(step.model)))
    assert_same(step, captured)


# what may happen between calls


@on_devices
def test_a_schedule_and_new_numbers_take_effect(device: str) -> None:
    step, captured = twins("llama", device, rule="adam", weight_decay=0.1)
    data = batches(6, device)
    run = captured.capture(data[0], per_example(captured.model))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in (step, captured)]
    for i, b in enumerate(data):
        for opt in (step, captured):
            if i == 2:
                opt.param_groups[0].update(eps=3e-3, betas=(0.8, 0.95), weight_decay=0.0)
            if i == 4:
                opt.param_groups[0].update(weight_decay=0.3, adam_eps=1e-6)
        assert torch.equal(run(b), step.step(b, per_example(step.model)))
        assert_same(step, captured)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            for schedule in schedules:
                schedule.step()
    assert captured._numbers.hyper.lr != step.param_groups[0]["initial_lr"]


@on_devices
def test_lr_may_be_a_tensor_on_the_device(device: str) -> None:
    step, captured = twins("llama", device)
    data = batches(3, device)
    run = captured.capture(data[0], per_example(captured.model))
    for i, b in enumerate(data):
        step.param_groups[0]["lr"] = 1e-2 / (i + 1)
        lr = torch.tensor(1e-2 / (i + 1), dtype=torch.float64, device=device)
        captured.param_groups[0]["lr"] = lr
        with waiting_is_an_error(device):
            loss = run(b)
        assert torch.equal(loss, step.step(b, per_example(step.model)))
    assert_same(step, captured)


@on_devices
@pytest.mark.parametrize("rule", RULES)
def test_a_loss_that_is_not_finite_skips_the_step(device: str, rule: str) -> None:
    step, captured = twins("llama", device, rule=rule, weight_decay=0.1)
    data = batches(3, device)
    for i, b in enumerate(data):
        b["scale"] = torch.full((3,), float("nan") if i == 1 else 1.0, device=device)

    def scaled(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(b: dict[str, Tensor]) -> Tensor:
            inputs = {k: v for k, v in b.items() if k != "scale"}
            return per_example(model)(inputs) * b["scale"]

        return loss

    run = captured.capture(data[0], scaled(captured.model))
    run(data[0])
    before = {k: v.clone() for k, v in tensors(captured).items()}
    assert not torch.isfinite(run(data[1]))
    assert captured.skipped == 1 and captured.steps == 2
    for name, value in tensors(captured).items():
        if name not in ("rng", "skipped"):
            assert torch.equal(value, before[name]), name
    run(data[2])
    for b in data:
        step.step(b, scaled(step.model))
    assert_same(step, captured)


@on_devices
def test_steps_and_runs_may_alternate_and_the_model_is_usable_between(device: str) -> None:
    step, captured = twins("llama", device, rule="momentum")
    data = batches(6, device)
    run = captured.capture(data[0], per_example(captured.model))
    for i, b in enumerate(data):
        if i % 2:
            captured.step(lambda b=b: per_example(captured.model)(b).mean())
            step.step(lambda b=b: per_example(step.model)(b).mean())
        else:
            run(b)
            step.step(b, per_example(step.model))
        with torch.no_grad():
            assert torch.equal(captured.model(**b).logits, step.model(**b).logits)
    assert_same(step, captured)


@on_devices
def test_losses_stay_as_they_are_when_the_graph_runs_again(device: str) -> None:
    _, captured = twins("llama", device)
    data = batches(3, device)
    run = captured.capture(data[0], per_example(captured.model))
    first = run(data[0])
    value = first.clone()
    run(data[1])
    assert torch.equal(first, value) and first.dtype == torch.float32 and first.dim() == 0


@on_devices
@pytest.mark.parametrize("apply", ["forward", "in_place"])
def test_a_state_loads_into_captured_steps_and_continues_bit_for_bit(
    device: str, apply: str
) -> None:
    step, captured = twins("llama", device, rule="adam", apply=apply)
    data = batches(7, device)
    run = captured.capture(data[0], per_example(captured.model))
    for b in data[:2]:
        step.step(b, per_example(step.model))
        run(b)
    weights, state = step.model.state_dict(), step.state_dict()
    weights = {k: v.clone() for k, v in weights.items()}
    for b in data[2:5]:
        run(b)  # runs ahead, into another window
    captured.model.load_state_dict(weights)
    captured.load_state_dict(state)
    for b in data[2:]:
        assert torch.equal(run(b), step.step(b, per_example(step.model)))
    assert_same(step, captured)
    saved = captured.state_dict()
    assert saved["tensors"].keys() == step.state_dict()["tensors"].keys()


@pytest.mark.parametrize("apply", ["forward", "in_place"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_what_a_graph_reads_stays_where_it_is(name: str, rule: str, apply: str) -> None:
    opt, _ = twins(name, "cpu", rule=rule, apply=apply, refresh_every=2)
    b = batch()

    def places() -> dict[str, int]:
        return {k: v.data_ptr() for k, v in tensors(opt).items()}

    opt.step(b, per_example(opt.model))
    before = places()
    state = opt.state_dict()
    shown = {id(m.u) for m in opt._weights.side.matrices.values()}
    for _ in range(4):
        opt.step(b, per_example(opt.model))
    opt.fold()
    opt.load_state_dict(state)
    assert places() == before
    assert shown == {id(m.u) for m in opt._weights.side.matrices.values()}
