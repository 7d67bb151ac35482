"""Which backend runs an op, and why.

``SUBZERO_BACKEND`` is read at each call: ``auto`` (the default) takes the native backend of the
tensors' device where it is built and has the op, else ``reference``; a name takes that backend or
raises. On NVIDIA GPUs there are two, ``cuda`` and ``triton``: auto takes the one that was measured
to be the faster for the op, the dtype and the size (``choices.json``, empty until both have been
measured), the other where that one cannot run, and ``cuda`` before ``triton`` where nothing was
measured.

A backend is a module of this package with the op's own name and arguments as plain functions,
``OPS`` (the names it has) and ``available()`` (whether it runs here, and why). It may have
``DEVICES``, the types of device that it takes where they are not those of its name, and a
``perturb_plan(ws, us, vs, streams)`` of its own, whose ``perturb_`` a plan then calls.
Backends trust their inputs: :mod:`subzero_kernels.validate` has checked them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from importlib import resources
from types import ModuleType
from typing import Any, NamedTuple

VARIABLE = "SUBZERO_BACKEND"
NAMES = ("cuda", "triton", "cpu", "reference")

# The device type of the tensors that a native backend takes; reference takes any.
_DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}
# What auto looks at, in this order where nothing was measured, before it falls back to reference.
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_REMEDY = f"set {VARIABLE}=auto or {VARIABLE}=reference"

# Elements of the (first) tensor from which on an op counts as large: its speed, not its launch.
LARGE = 1 << 20


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
        takes = getattr(module, "DEVICES", _DEVICES[name])
        if device not in takes:
            return None, f"the {name} backend takes {takes[0]} tensors, these are on {device}"
    return module, why


@functools.cache
def measured() -> dict[str, Any]:
    """choices.json: ``on`` (where it was measured) and, by op and kind, ``us`` by backend."""
    text = resources.files(__name__).joinpath("choices.json").read_text(encoding="utf-8")
    return json.loads(text)


@functools.cache
def kind_of(dtype: object, large: bool) -> str:
    """The key under which choices.json has an op's times: "bfloat16 large", "float32 small".

    Args:
        dtype: of the (first) tensor, a torch.dtype.
        large: whether it has LARGE elements or more.
    """
    return f"{str(dtype).removeprefix('torch.')} {'large' if large else 'small'}"


def kinds(op: str) -> list[str]:
    """The kinds that an op was measured for."""
    return list(measured()["us"].get(op, {}))


def _candidates(op: str, device: str, kind: str) -> tuple[list[str], str]:
    """What auto tries on this type of device, fastest first, and what to say of the first."""
    names = list(_AUTO.get(device, ()))
    times: dict[str, float] = measured()["us"].get(op, {}).get(kind, {})
    if len(names) < 2 or not all(name in times for name in names):
        return names, ""
    names.sort(key=lambda name: times[name])
    best, other = names[:2]
    on = measured()["on"]
    return names, f"{times[other] / times[best]:.2f} times as fast as {other} ({kind}, {on}); "


@functools.lru_cache(maxsize=1024)
def _choose(setting: str, op: str, device: str, float64: bool, kind: str = "") -> Choice:
    if setting == "auto":
        names, praise = _candidates(op, device, kind)
        reasons = []
        for i, name in enumerate(names):
            module, why = _usable(name, op, device, float64)
            if module is not None:
                return Choice(getattr(module, op), name, (praise if i == 0 else "") + why)
            reasons.append(why)
        reference = importlib.import_module(f"{__name__}.reference")
        why = "; ".join(dict.fromkeys(reasons)) or f"no native backend takes {device} tensors"
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


def choose(op: str, device: str, float64: bool = False, kind: str = "") -> Choice:
    """The backend that runs ``op`` on tensors of device type ``device`` now.

    Args:
        kind: what :func:`kind_of` says of the first tensor; without it nothing was measured.

    Raises:
        ValueError: SUBZERO_BACKEND holds an unknown name.
        RuntimeError: SUBZERO_BACKEND names a backend that is unavailable here, lacks the op, or
            does not take such tensors.
    """
    return _choose(os.environ.get(VARIABLE, "") or "auto", op, device, float64, kind)
