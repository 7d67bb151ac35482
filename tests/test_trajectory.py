"""Trajectories: the file alone rebuilds the weights, and a killed run goes on, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, build, per_example, same_bits, snapshot

from subzero import SubZero
from subzero.trajectory import fingerprint, read

BASE: dict[str, Any] = dict(lr=1e-2, eps=1e-2, rank=4, refresh_every=3, weight_decay=0.1, seed=11)
RULES = [
    dict(rule="sgd"),
    dict(rule="momentum"),
    dict(rule="adam", state_at_refresh="keep"),
    dict(rule="norm", queries=4),
    dict(rule="muon", queries=4),
]
WRONG = dict(rank=5, seed=5)


def train(path: Path, steps: int = 8, device: str = "cpu", name: str = "llama", **options: Any):
    """A recorded run: a scheduler's lr, a fold in the middle, a skipped step."""
    model = build(name, dtype=options.pop("dtype", torch.float32)).to(device)
    opt = SubZero(model, **{**BASE, **options})
    opt.record(path)
    b = {key: value.to(device) for key, value in batch().items()}
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.01 / (step + 1)
        if step == 4:
            opt.fold()
            opt.param_groups[0]["eps"] = 2e-2
        factor = float("nan") if step == 5 else 1.0
        opt.step(b, lambda x, factor=factor: per_example(model)(x) * factor)
    return model, opt


def rebuilt(path: Path, device: str = "cpu", name: str = "llama", **options: Any):
    model = build(name, dtype=options.pop("dtype", torch.float32)).to(device)
    opt = SubZero(model, **{**BASE, **options})
    opt.replay(path)
    return model, opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["rule"])
def test_replay_gives_the_weights_of_training(tmp_path: Path, rule: dict, dtype: Any) -> None:
    path = tmp_path / "trajectory.jsonl"
    model, opt = train(path, **rule, dtype=dtype)
    start = snapshot(build("llama", dtype=dtype))
    other, again = rebuilt(path, **rule, dtype=dtype)
    assert (again.steps, again.draws, again.skipped) == (opt.steps, opt.draws, 1)
    b = batch()
    assert torch.equal(opt.step(b, per_example(model)), again.step(b, per_example(other)))
    opt.fold()
    again.fold()
    assert same_bits(other, snapshot(model)) and not same_bits(other, start)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_replay_of_weights_without_a_side_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trajectory.jsonl"
    model, opt = train(path, name=name, dtype=torch.bfloat16)
    other, again = rebuilt(path, name=name, dtype=torch.bfloat16)
    opt.detach()
    again.detach()
    assert same_bits(other, snapshot(model))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["rule"])
def test_replay_of_captured_steps_on_a_gpu(tmp_path: Path, rule: dict) -> None:
    path = tmp_path / "trajectory.jsonl"
    model = build("llama", dtype=torch.bfloat16).cuda()
    opt = SubZero(model, **BASE, **rule)
    b = {key: value.cuda() for key, value in batch().items()}
    run = opt.capture(b, per_example(model))
    opt.record(path)  # after the capture: the graph is made again
    for step in range(8):
        opt.param_groups[0]["lr"] = 0.01 / (step + 1)
        run(b)
    opt.detach()
    other, again = rebuilt(path, device="cuda", **rule, dtype=torch.bfloat16)
    again.detach()
    assert same_bits(other, snapshot(model))


def test_a_step_takes_less_than_64_bytes(tmp_path: Path) -> None:
    path = tmp_path / "trajectory.jsonl"
    model, opt = train(path, 1)
    opt.draws = 2**32 - 2  # as long as a draw gets
    opt.step(batch(), per_example(model))
    lines = path.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])[0] == 2**32 - 2 and len(lines[-1]) < 64


def test_the_fingerprint_sees_every_part() -> None:
    model = build("llama")
    whole = fingerprint(model)
    assert fingerprint(build("llama")) == whole
    weight = next(model.parameters())
    with torch.no_grad():
        weight.view(torch.int32)[-1, -1] ^= 1
    assert fingerprint(model) != whole
    assert fingerprint(build("llama").bfloat16()) != fingerprint(build("llama").half())


def _cut(data: bytes) -> bytes:
    return data[:-5]


def _flip(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    row = json.loads(lines[1])
    row[1] = f"{int(row[1], 16) ^ 1:08x}"
    return b"".join([lines[0], json.dumps(row, separators=(",", ":")).encode() + b"\n", *lines[2:]])


def _version(data: bytes) -> bytes:
    return data.replace(b'"contract":1', b'"contract":9', 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (_cut, "--drop-torn"),
        (_flip, "that was changed"),
        (_version, "contract 1 of format 1, got 9"),
        (lambda data: b"", "empty file"),
        (lambda data: b"{}\n", "header in line 1"),
    ],
)
def test_a_bad_file_is_one_error_and_changes_nothing(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "trajectory.jsonl"
    train(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        rebuilt(path)


@pytest.mark.parametrize("option", WRONG)
def test_other_options_and_models_are_errors(tmp_path: Path, option: str) -> None:
    path = tmp_path / "trajectory.jsonl"
    train(path)
    with pytest.raises(ValueError, match=f"expected {option}="):
        rebuilt(path, **{option: WRONG[option]})
    model = build("llama", seed=3)
    with pytest.raises(ValueError, match="the run started from"):
        SubZero(model, **BASE).replay(path)
    assert same_bits(model, snapshot(build("llama", seed=3)))


def test_what_cannot_be_recorded_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for options, message in [
        (dict(noise="activation", rank=4), "export_lora"),
        (dict(apply="in_place"), "apply='forward'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SubZero(build("llama"), **options).record(path)
    assert not path.exists()
    model, opt = train(path, 2)
    with pytest.raises(FileExistsError):
        SubZero(build("llama"), **BASE).record(path)
    model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="loaded from outside at step 2"):
        read(path)
