"""Fixtures shared by all tests: the backends that can run here, each on the devices it takes."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from subzero_kernels import backends


class Target(NamedTuple):
    """A backend, forced through SUBZERO_BACKEND, and the device of the tensors it gets."""

    backend: str
    device: str


def _targets() -> list[Target]:
    """reference runs everywhere; a native backend where it is built and its device is there.

    Under TRITON_INTERPRET=1, Triton's interpreter and nothing else: test_triton_interpreter.py runs
    the tests of the ops that way, in a process of its own.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [Target("triton", "cpu")]
    targets = [Target("reference", "cpu")]
    if backends.load("cpu")[0] is not None:
        targets.append(Target("cpu", "cpu"))
    if torch.cuda.is_available():
        targets.append(Target("reference", "cuda"))
        if backends.load("cuda")[0] is not None:
            targets.append(Target("auto", "cuda"))  # the cuda backend where it has the op
        if backends.load("triton")[0] is not None:
            targets.append(Target("triton", "cuda"))
    return targets


def _parameters() -> list:
    """The targets as pytest wants them: those on a GPU behind the marker."""
    return [
        pytest.param(
            target,
            id=f"{target.backend}-{target.device}",
            marks=[pytest.mark.gpu] if target.device == "cuda" else [],
        )
        for target in _targets()
    ]


@pytest.fixture(params=_parameters())
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """One of the backends that can run here; a test that takes it runs once on each."""
    monkeypatch.setenv(backends.VARIABLE, request.param.backend)
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests draw their data from torch's global generator, the same in every run and order."""
    torch.manual_seed(20241008)
