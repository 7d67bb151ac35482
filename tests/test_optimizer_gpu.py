"""The optimizer on a GPU: the same step as on the CPU, within the precision of its products."""

from __future__ import annotations

import pytest
import torch
from tiny_models import batch, build, closure, per_example, same_bits, snapshot

from subzero import SubZero, next_token

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPTIONS = dict(lr=1e-2, eps=1e-2, rank=4, queries=2, seed=5)


@pytest.mark.parametrize("apply", ["forward", "in_place"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_a_step_on_the_gpu_equals_one_on_the_cpu(name: str, apply: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    changes = []
    for device in ("cpu", "cuda"):
        model = build(name).to(device)
        b = {k: v.to(device) for k, v in batch().items()}
        before = snapshot(model)
        opt = SubZero(model, apply=apply, **OPTIONS)
        loss = opt.step(b, per_example(model))
        assert loss.device.type == device
        opt.step(closure(model, b))
        opt.detach()
        changes.append({n: (p.detach() - before[n]).cpu() for n, p in model.named_parameters()})
    for n, expected in changes[0].items():
        assert (changes[1][n] - expected).norm() <= 5e-3 * expected.norm() + 1e-6, n


def test_bf16_weights_stay_within_a_window() -> None:
    model = build("llama", dtype=torch.bfloat16).cuda()
    b = {k: v.cuda() for k, v in batch(examples=8).items()}
    before = snapshot(model)
    opt = SubZero(
        model, lr=1e-2, eps=1e-2, rank=8, rule="norm", queries=4, sides="one", refresh_every=1000
    )
    first = opt.step(b, per_example(model)).item()
    for _ in range(59):
        last = opt.step(b, per_example(model)).item()
    assert last < first - 0.1
    assert same_bits(model, before)
    opt.fold()
    assert not same_bits(model, before)


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])
@pytest.mark.parametrize("form", ["core", "right", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activation_noise_on_the_gpu_equals_that_on_the_cpu(
    name: str, form: str, whole: bool
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    changes = []
    for device in ("cpu", "cuda"):
        model = build(name).to(device)
        b = {k: v.to(device) for k, v in batch().items()}
        before = snapshot(model)
        opt = SubZero(
            model, noise="activation", form=form, rule="norm", lr=0.1, eps=1e-2, rank=4,
            queries=6, refresh_every=2, seed=5,
        )  # fmt: skip
        if whole:
            opt.evaluate_whole_groups("as the test asks")
        for _ in range(3):
            loss = opt.step(b, next_token())
        assert loss.device.type == device
        assert bool(opt.plan().whole_groups) == whole
        opt.detach()
        changes.append({n: (p.detach() - before[n]).cpu() for n, p in model.named_parameters()})
    for n, expected in changes[0].items():
        assert (changes[1][n] - expected).norm() <= 5e-3 * expected.norm() + 1e-6, n


def test_activation_noise_trains_bf16_within_a_window() -> None:
    model = build("llama", dtype=torch.bfloat16).cuda()
    b = {k: v.cuda() for k, v in batch(examples=8).items()}
    before = snapshot(model)
    opt = SubZero(
        model, noise="activation", form="core", rule="muon", lr=0.1, eps=3e-2, rank=8, queries=8
    )
    first = opt.step(b, next_token()).item()
    for _ in range(29):
        last = opt.step(b, next_token()).item()
    assert last < first - 0.1
    assert same_bits(model, before)
    opt.fold()
    assert not same_bits(model, before)
