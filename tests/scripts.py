"""The scripts of benchmarks/ as modules, for their tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[ModuleType]:
    """benchmarks/name.py, which finds its neighbours; afterwards torch and Python are as before."""
    before, grad = set(sys.modules), torch.is_grad_enabled()
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        yield importlib.import_module(name)
    finally:
        torch.set_grad_enabled(grad)
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(FOLDER)):
                del sys.modules[module]
