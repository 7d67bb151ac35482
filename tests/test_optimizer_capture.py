"""``run = opt.capture(batch, objective)``: the captured step is the step, bit for bit.

On a CPU, which has no graphs, ``run`` is the step itself; graph_emulator.py makes graphs there that
replay ops on the same memory. What they rely on is seen too: every tensor that outlives a step
stays where it is.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graph_emulator import emulated  # noqa: F401 - a fixture
from tiny_models import batch, build, per_example, same_bits, snapshot
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero, label_words, next_token

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICES = [pytest.param("cpu"), pytest.param("emulated"), pytest.param("cuda", marks=GPU)]
OPTIONS: dict[str, Any] = dict(lr=1e-2, eps=1e-2, rank=4, queries=4, seed=5, refresh_every=3)
RULES = ["sgd", "momentum", "adam", "norm", "muon"]

on_devices = pytest.mark.parametrize("device", DEVICES, indirect=True)
on_graphs = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
on_gpu = pytest.mark.parametrize("device", DEVICES[2:], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, the CPU with graphs that graph_emulator.py makes, or a GPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    return "cuda" if request.param == "cuda" else "cpu"


def batches(count: int, device: str, tokens: int = 7, examples: int = 3) -> list[dict[str, Tensor]]:
    some = [batch(examples, tokens, seed=10 + i) for i in range(count)]
    return [{k: v.to(device) for k, v in b.items()} for b in some]


def tensors(opt: SubZero) -> dict[str, Tensor]:
    """Everything that a step reads or writes and that outlives it."""
    weights = opt._weights
    found = {n: p.detach() for n, p in opt.model.named_parameters()}
    for name, space in weights.spaces():
        found[f"{name} value"] = space.value
        for key, value in opt._rule_state[name].items():
            found[f"{name} {key}"] = value
    for i, pair in enumerate(getattr(weights, "_bases", [])):
        found[f"u {i}"], found[f"v {i}"] = pair
    numbers = opt._numbers._held | {"rng": opt._rng, "skipped": opt._skipped}
    return found | numbers | {"folds": weights.fold_rng, "decay": weights.decay}


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def assert_same(one: SubZero, other: SubZero) -> None:
    """A rule's state that is not there yet is zero."""
    mine, theirs = tensors(one), tensors(other)
    for name in mine | theirs:
        a = mine.get(name, theirs.get(name, torch.zeros(1)) * 0)
        b = theirs.get(name, a * 0)
        assert torch.equal(bits(a), bits(b)), name
    assert (one.steps, one.draws, one.window) == (other.steps, other.draws, other.window)
    assert (one.skipped, one._weights.folds) == (other.skipped, other._weights.folds)


def twins(name: str, device: str, **options: Any) -> tuple[SubZero, SubZero]:
    dtype = options.pop("dtype", torch.float32)
    return tuple(  # type: ignore[return-value]
        SubZero(build(name, dtype=dtype).to(device), **{**OPTIONS, **options}) for _ in range(2)
    )


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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


# several shapes, memory


@on_devices
def test_shapes_alternate_in_one_pool(device: str) -> None:
    step, captured = twins("llama", device, rule="momentum")
    short, long = batches(4, device, tokens=5), batches(4, device, tokens=11)
    runs = {
        b["input_ids"].shape[1]: captured.capture(b, per_example(captured.model))
        for b in (long[0], short[0])
    }
    assert_same(step, captured)
    for b in (short[0], long[0], long[1], short[1], long[2], short[2], short[3], long[3]):
        expected = step.step(b, per_example(step.model))
        assert torch.equal(runs[b["input_ids"].shape[1]](b), expected)
    assert_same(step, captured)


@on_gpu
def test_a_second_shape_takes_memory_of_the_first(device: str) -> None:
    model = build("llama").cuda()
    opt = SubZero(model, **OPTIONS)
    long, short = batches(1, device, 512, 32)[0], batches(1, device, 448, 32)[0]
    opt.capture(batches(1, device)[0], per_example(model))  # workspaces and compiled kernels
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    first = opt.capture(long, per_example(model))
    torch.cuda.empty_cache()
    between = torch.cuda.memory_reserved()
    second = opt.capture(short, per_example(model))
    torch.cuda.empty_cache()
    after = torch.cuda.memory_reserved()
    assert between - before > 20 << 20
    assert after - between < (between - before) / 4
    assert torch.isfinite(first(long)) and torch.isfinite(second(short))


@on_gpu
def test_a_run_allocates_nothing(device: str) -> None:
    model = build("llama").cuda()
    opt = SubZero(model, **{**OPTIONS, "refresh_every": 1000})
    data = batches(4, device)
    run = opt.capture(data[0], per_example(model))
    run(data[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    losses = [run(b) for b in data * 5]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert all(torch.isfinite(loss) for loss in losses)


@on_gpu
def test_weights_stay_as_they_are_within_a_window(device: str) -> None:
    model = build("llama", dtype=torch.bfloat16).cuda()
    before = snapshot(model)
    opt = SubZero(model, **{**OPTIONS, "refresh_every": 100_000})
    data = batches(4, device)
    run = opt.capture(data[0], per_example(model))
    first = run(data[0]).item()
    for i in range(999):
        last = run(data[i % 4])
    assert same_bits(model, before) and torch.isfinite(last) and last.item() != first
    opt.fold()
    assert not same_bits(model, before)


@on_gpu
def test_batches_from_the_cpu_are_copied_without_waiting(device: str) -> None:
    step, captured = twins("llama", device)
    data = batches(4, "cpu")
    run = captured.capture(data[0], per_example(captured.model))
    for b in data:
        there = {k: v.cuda() for k, v in b.items()}
        expected = step.step(there, per_example(step.model))
        pinned = {k: v.pin_memory() for k, v in b.items()}
        with waiting_is_an_error(device):
            loss = run(pinned)
        assert torch.equal(loss, expected)


@on_gpu
def test_a_step_that_is_not_captured_does_not_wait(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.import_utils as transformers_utils

    # or transformers looks into the mask
    monkeypatch.setattr(transformers_utils, "is_cuda_stream_capturing", lambda: True)
    step, _ = twins("llama", device, rule="norm")
    b = batches(1, device)[0]

    def closure() -> Tensor:
        return per_example(step.model)(b).mean()

    step.step(closure)
    with waiting_is_an_error(device):
        for _ in range(4):  # a window opens
            step.step(closure)
            step.step(b, per_example(step.model))
    assert step.steps == 9


# errors


@on_graphs
def test_what_cannot_be_captured_says_why_and_leaves_no_trace(device: str) -> None:
    step, captured = twins("llama", device)
    b = batches(1, device)[0]

    def reads(b: dict[str, Tensor]) -> Tensor:
        loss = per_example(captured.model)(b)
        return loss if loss.sum().item() > 0 else -loss

    with pytest.raises(RuntimeError, match="capture: expected .* synchroniz.*; keep the model"):
        captured.capture(b, reads)
    assert_same(step, captured)
    assert device == "cpu" or torch.cuda.get_sync_debug_mode() == 0
    run = captured.capture(b, per_example(captured.model))
    assert torch.equal(run(b), step.step(b, per_example(step.model)))


@on_graphs
def test_more_positions_than_captured(device: str) -> None:
    _, captured = twins("llama", device)
    b = batches(1, device)[0]
    few, many = (torch.zeros(3, 7, dtype=torch.bool, device=device) for _ in range(2))
    few[:, 2:4] = True
    many[:, 2:6] = True
    run = captured.capture(b, next_token(), few)
    assert torch.isfinite(run(b, few))
    there = {k: v.cpu() for k, v in b.items()}
    with pytest.raises(ValueError, match="expected at most 2 scored positions .* got 4; capture"):
        run(there, many.cpu())
    assert captured.steps == 1
    if device == "cuda":  # where the mask is not read before the step
        assert not torch.isfinite(run(b, many)) and captured.skipped == 1


def test_losses_of_more_positions_than_known_are_not_finite() -> None:
    model = build("llama")
    opt = SubZero(model, **OPTIONS)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 2:4] = True
    losses = []
    for width in (1, 2, 3):
        evaluate = opt._evaluator.bind(batch(), next_token(), mask, [width])
        with torch.no_grad(), opt._weights.perturbed(torch.tensor(1e-2), opt._rng) as signs:
            losses.append(evaluate(signs))
    assert not torch.isfinite(losses[0]).any()
    assert torch.allclose(losses[1], losses[2]) and torch.isfinite(losses[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "input_ids": b["input_ids"][:, :5]},
         r"batch\['input_ids'\]: expected a tensor of shape \(3, 7\) and int64, got a tensor of "
         r"shape \(3, 5\) and int64; capture"),
        (lambda b: {**b, "input_ids": b["input_ids"].int()}, "int64, got .* and int32; capture"),
        (lambda b: {"input_ids": b["input_ids"]},
         r"batch: expected the keys \['attention_mask', 'input_ids', 'note'\], got the keys"),
        (lambda b: {**b, "note": 2}, r"batch\['note'\]: expected 1, got 2; capture"),
        (lambda b: [b, b], "batch: expected the keys .* got a list of 2; capture"),
        (lambda b: b["input_ids"], "batch: expected the keys .* got a tensor of shape"),
    ],
)  # fmt: skip
def test_another_batch_is_one_error_and_nothing_is_touched(change: Any, message: str) -> None:
    opt, _ = twins("llama", "cpu")

    def loss(b: dict[str, Any]) -> Tensor:
        return per_example(opt.model)({k: v for k, v in b.items() if k != "note"})

    b = {**batch(), "note": 1}
    run = opt.capture(b, loss)
    run(b)
    before = {k: v.clone() for k, v in tensors(opt).items()}
    with pytest.raises(ValueError, match=message):
        run(change(b))
    with pytest.raises(ValueError, match="positions: expected None, got a tensor"):
        run(b, b["attention_mask"])
    assert all(torch.equal(v, before[k]) for k, v in tensors(opt).items()) and opt.steps == 1


def test_errors_of_a_step_are_errors_of_capture() -> None:
    opt, _ = twins("llama", "cpu")
    with pytest.raises(TypeError, match="objective: expected a callable, got int"):
        opt.capture(batch(), 3)
    with pytest.raises(TypeError, match="objective: expected a callable, got NoneType"):
        opt.capture(batch(), None)
    with pytest.raises(ValueError, match="positions: expected a mask"):
        opt.capture(batch(), per_example(opt.model), torch.ones(3, 2))
    with pytest.raises(ValueError, match="lr: expected"):
        opt.param_groups[0]["lr"] = -1.0
        opt.capture(batch(), per_example(opt.model))


@on_devices
def test_a_run_after_detach_is_an_error(device: str) -> None:
    opt, _ = twins("llama", device)
    b = batches(1, device)[0]
    run = opt.capture(b, per_example(opt.model))
    opt.detach()
    before = snapshot(opt.model)
    with pytest.raises(RuntimeError, match="run: expected an attached optimizer, got .* detach"):
        run(b)
    assert same_bits(opt.model, before)


def test_the_width_of_a_loss_is_read_where_it_is_not_known() -> None:
    mask = torch.tensor([[True, False, True], [True, False, False]])
    known = LogitsLoss(lambda x, b: x.sum((1, 2)), width=1)
    assert known.read(mask, None)[0].shape == (2, 1)
    assert known.read(mask, mask)[0].shape == (2, 2)
    assert known.read(mask, mask, 3)[0].shape == (2, 3)
