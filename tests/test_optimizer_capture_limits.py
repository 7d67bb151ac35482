"""Captured steps: several shapes in one pool of memory, no waiting, and what cannot be captured."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from capture_cases import (
    OPTIONS,
    assert_same,
    batches,
    device_fixture,  # noqa: F401
    emulated,  # noqa: F401
    on_devices,
    on_gpu,
    on_graphs,
    tensors,
    twins,
    waiting_is_an_error,
)
from tiny_models import batch, build, per_example, same_bits, snapshot
from torch import Tensor

from subzero import LogitsLoss, SubZero, next_token

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
