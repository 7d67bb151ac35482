"""What the tests of captured steps share: devices, twins of an optimizer, what must be the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graph_emulator import emulated  # noqa: F401 - a fixture
from tiny_models import batch, build
from torch import Tensor

from subzero import SubZero
from subzero.activation_weights import ActivationWeights

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


@pytest.fixture(name="device")
def device_fixture(request: pytest.FixtureRequest) -> str:
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
    if isinstance(weights, ActivationWeights):
        found |= of_activation(weights)
    else:
        for i, pair in enumerate(weights._bases):
            found[f"u {i}"], found[f"v {i}"] = pair
    numbers = opt._numbers._held | {"rng": opt._rng, "skipped": opt._skipped}
    return found | numbers | {"folds": weights.fold_rng, "decay": weights.decay}


def of_activation(weights: ActivationWeights) -> dict[str, Tensor]:
    found = {f"v {i}": v for i, v in enumerate(weights._bases)}
    found |= {f"turned {i}": core for i, core in enumerate(weights._turned)}
    carriers = [tap.carrier for tap in weights.taps]
    found |= {f"u {i}": u for i, u in enumerate(carriers) if u is not None}
    seen = weights._seen
    if seen is not None:  # the place behind a ring takes what is not remembered
        found |= {f"seen {i}": ring[:-1] for i, (ring, _) in enumerate(seen._own)}
        found |= {f"seen {axis}": count for axis, count in seen._counts.items()}
    return found


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
