"""Which backend runs an op, and why.

``SUBZERO_BACKEND`` is read at each call: ``auto`` (the default) takes the native backend of the
tensors' device where it is built and has the op, else ``reference``; a name takes that backend or
raises. On NVIDIA GPUs there are two, ``cuda`` and ``triton``. auto takes ``cuda``, but ``triton``
for the kinds of call (op, dtype, size, rank: :func:`kind_of`) at which it was measured to be faster
by more than :data:`MARGIN`; and the other one where that one cannot run. The measurements are in
``choices.json``, which ``benchmarks/choose_backends.py`` makes from the committed tables.

A backend is a module of this package with the op's own name and arguments as plain functions,
``OPS`` (the names it has) and ``available()`` (whether it runs here, and why). It may have
``DEVICES``, the types of device that it takes where they are not those of its name, and a
``perturb_plan(ws, us, vs, streams)`` of its own, whose ``perturb_`` a plan calls, and for an op
on lists a ``prepare_<op>``: it takes the op's arguments and returns what runs the op on the same
lists with any ``coeff`` and ``rng`` (of the same shapes, as ``run(coeff, rng)``), or None. That may
hold addresses, but no tensor: it is kept for calls to come (:mod:`subzero_kernels.known`).
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
# triton must be this much faster than cuda to be taken, so that no repeated run turns it over.
MARGIN = 0.03


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
    """choices.json.

    ``on`` says where it was measured, ``triton_speed`` by op and kind how many times as fast as
    ``cuda`` ``triton`` was; both are empty until both backends have been measured.
    """
    text = resources.files(__name__).joinpath("choices.json").read_text(encoding="utf-8")
    return json.loads(text)


def kind_of(dtype: object, numel: int, rank: int = 0) -> str:
    """What choices.json tells apart of an op's calls: "bfloat16 large rank 64", "float32 small".

    Args:
        dtype: of the (first) tensor, a torch.dtype.
        numel: its elements; from LARGE on it is large.
        rank: of U and V, or the width of what noise_outer_ multiplies. Kernels work on ranks
            rounded up to a power of two, 16 or more, and so does the kind. 0: the op has none.
    """
    return _kind(dtype, numel >= LARGE, max(4, (rank - 1).bit_length()) if rank else 0)


@functools.cache
def _kind(dtype: object, large: bool, log_rank: int) -> str:
    kind = f"{str(dtype).removeprefix('torch.')} {'large' if large else 'small'}"
    return f"{kind} rank {1 << log_rank}" if log_rank else kind


def kinds(op: str) -> list[str]:
    """The kinds that an op was measured for."""
    return list(measured()["triton_speed"].get(op, {}))


def _candidates(op: str, device: str, kind: str) -> tuple[list[str], str]:
    """What auto tries on this type of device, best first, and what to say of the first."""
    names = list(_AUTO.get(device, ()))
    speed: float | None = measured()["triton_speed"].get(op, {}).get(kind)
    if speed is None or "triton" not in names:
        return names, ""
    where = f"({kind}, {measured()['on']}); "
    if speed > 1 + MARGIN:
        return ["triton", "cuda"], f"{speed:.2f} times as fast as cuda {where}"
    if speed >= 1:
        return names, f"within {MARGIN:.0%} of triton {where}"
    return names, f"{1 / speed:.2f} times as fast as triton {where}"


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
        kind: what :func:`kind_of` says of the call; without it nothing was measured.

    Raises:
        ValueError: SUBZERO_BACKEND holds an unknown name.
        RuntimeError: SUBZERO_BACKEND names a backend that is unavailable here, lacks the op, or
            does not take such tensors.
    """
    return _choose(os.environ.get(VARIABLE, "") or "auto", op, device, float64, kind)
