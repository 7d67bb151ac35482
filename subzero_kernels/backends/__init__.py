"""Which backend runs an op, and why.

``SUBZERO_BACKEND`` is read at each call: ``auto`` (the default) takes the native backend of the
tensors' device where it is built and has the op, else ``reference``; a name takes that backend or
raises. A backend is a module of this package with the op's own name and arguments as plain
functions, ``OPS`` (the names it has) and ``available()`` (whether it runs here, and why); it may
have a ``perturb_plan(ws, us, vs, streams)`` of its own, whose ``perturb_`` a plan then calls.
Backends trust their inputs: :mod:`subzero_kernels.validate` has checked them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

VARIABLE = "SUBZERO_BACKEND"
NAMES = ("cuda", "triton", "cpu", "reference")

# The device type of the tensors that a native backend takes; reference takes any.
_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
# What auto looks at before it falls back to reference. Triton joins when its kernels are there and
# measured.
_AUTO = {"cpu": "cpu", "cuda": "cuda"}
_REMEDY = f"set {VARIABLE}=auto or {VARIABLE}=reference"


class Choice(NamedTuple):
    """The function that runs an op, the name of its backend and the reason."""

    function: Callable[..., Any]
    backend: str
    reason: str


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The backend's module if it can run here, else None; and why."""
    path = f"{__name__}.{name}"
    if importlib.util.find_spec(path) is None:
        return None, f"the {name} backend is not part of this version"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        return None, f"the {name} backend does not import: {error}"
    works, why = module.available()
    return (module if works else None), why


def _usable(name: str, op: str, device: str, float64: bool) -> tuple[ModuleType | None, str]:
    """The module of backend ``name`` if it can run ``op`` on these tensors, else None; and why."""
    module, why = load(name)
    if module is None:
        return None, why
    if op not in module.OPS:
        return None, f"the {name} backend has no {op}"
    if name != "reference":
        if float64:
            return None, "float64 is taken by the reference backend only"
        if _DEVICE[name] != device:
            return None, f"the {name} backend takes {_DEVICE[name]} tensors, these are on {device}"
    return module, why


@functools.lru_cache(maxsize=1024)
def _choose(setting: str, op: str, device: str, float64: bool) -> Choice:
    if setting == "auto":
        preferred = _AUTO.get(device)
        if preferred is None:
            why = f"no native backend takes {device} tensors"
        else:
            module, why = _usable(preferred, op, device, float64)
            if module is not None:
                return Choice(getattr(module, op), preferred, why)
        reference = importlib.import_module(f"{__name__}.reference")
        return Choice(getattr(reference, op), "reference", why)
    if setting not in NAMES:
        raise ValueError(
            f"{VARIABLE}: expected auto, {', '.join(NAMES)}, got {setting!r}; "
            "set it to one of these or unset it"
        )
    module, why = _usable(setting, op, device, float64)
    if module is None:
        raise RuntimeError(f"{VARIABLE}={setting} cannot run {op}: {why}; {_REMEDY}")
    return Choice(getattr(module, op), setting, f"{VARIABLE}={setting}")


def choose(op: str, device: str, float64: bool = False) -> Choice:
    """The backend that runs ``op`` on tensors of device type ``device`` now.

    Raises:
        ValueError: SUBZERO_BACKEND holds an unknown name.
        RuntimeError: SUBZERO_BACKEND names a backend that is unavailable here, lacks the op, or
            does not take such tensors.
    """
    return _choose(os.environ.get(VARIABLE, "") or "auto", op, device, float64)
