"""Saving and resuming an optimizer: tensors, numbers and strings only, checked before use."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import options
from .spaces import Space

if TYPE_CHECKING:
    from .optimizer import SubZero

CONTRACT = 1  # version of the RNG contract and of this layout
GROUP = ("lr", "eps", "momentum", "betas", "adam_eps", "weight_decay")


def save(opt: SubZero) -> dict[str, Any]:
    """The state after a fold: S is zero, and the bases follow from seed and window."""
    weights = opt._weights
    tensors = {
        f"{space}.{name}": value.clone()
        for space, group in opt._rule_state.items()
        for name, value in group.items()
    }
    tensors |= {name: value.clone() for name, value in weights.tensors().items()}
    group = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    return {
        "contract": CONTRACT,
        "options": dataclasses.asdict(opt.options),
        "parameters": _parameters(opt),
        "counters": {
            "steps": opt.steps,
            "draws": opt.draws,
            "window": opt.window,
            "folds": weights.folds,
            "skipped": opt.skipped,
        },
        "param_groups": [group],
        "tensors": tensors,
    }


def load(opt: SubZero, saved: dict[str, Any]) -> None:
    """Check everything, then set everything."""
    weights = opt._weights
    for key in ("contract", "options", "parameters", "counters", "param_groups", "tensors"):
        if key not in saved:
            raise ValueError(
                f"state_dict: expected the key {key!r}, got {sorted(saved)}; "
                "pass what state_dict() gave"
            )
    if saved["contract"] != CONTRACT:
        raise ValueError(
            f"state_dict: expected contract {CONTRACT}, got {saved['contract']}; "
            "resume with the version that saved it"
        )
    fixed = dataclasses.asdict(opt.options)
    for name, value in fixed.items():
        if saved["options"].get(name) != value:
            raise ValueError(
                f"state_dict: expected {name}={value!r} as this optimizer has, got "
                f"{saved['options'].get(name)!r}; build SubZero with the saved options"
            )
    for ours, theirs in zip(_parameters(opt), saved["parameters"], strict=False):
        if list(ours) != list(theirs):
            raise ValueError(
                f"state_dict: expected parameter {ours}, got {theirs}; load it into the same model"
            )
    if len(saved["parameters"]) != len(_parameters(opt)):
        raise ValueError(
            f"state_dict: expected {len(_parameters(opt))} trained parameters, got "
            f"{len(saved['parameters'])}; freeze the same ones as when it was saved"
        )
    spaces = dict(weights.spaces())
    for name, value in saved["tensors"].items():
        space, _, key = name.partition(".")
        rule = space in spaces and (key == "updates" or value.shape == (spaces[space].size,))
        if not weights.expects(name, value) and not (rule and name != "dense.value"):
            raise ValueError(
                f"state_dict: expected no tensor {name} of shape {tuple(value.shape)} here"
            )
    missing = weights.missing(saved["tensors"].keys())
    if missing:
        raise ValueError(
            f"state_dict: expected the tensor {missing} beside {sorted(saved['tensors'])}, got "
            "none; pass all of what state_dict() gave"
        )
    group = {k: v for k, v in saved["param_groups"][0].items() if k != "params"}
    options.check_group({k: group[k] for k in GROUP})

    own = {n: v for n, v in saved["tensors"].items() if weights.expects(n, v)}
    counters = saved["counters"]
    with torch.no_grad():
        opt.fold()
        for held in opt._rule_state.values():  # captured graphs read these very tensors
            for tensor in held.values():
                tensor.zero_()
        for name, value in saved["tensors"].items():
            space, _, key = name.partition(".")
            if name not in own:
                _restore(opt._rule_state[space], key, _like(value, spaces[space], key))
        opt.steps, opt.draws = counters["steps"], counters["draws"]
        opt.window, weights.folds = counters["window"], counters["folds"]
        opt._skipped.fill_(counters["skipped"])
        opt.param_groups[0].update(group)
        weights.resume(max(opt.window, 0), own)


def _like(value: Tensor, space: Space, key: str) -> Tensor:
    dtype = torch.float64 if key == "updates" else space.dtype
    return value.detach().to(space.value.device, dtype).clone()


def _restore(state: dict[str, Tensor], key: str, value: Tensor) -> None:
    if key in state:
        state[key].copy_(value)
    else:
        state[key] = value


def _parameters(opt: SubZero) -> list[list[Any]]:
    return [[e.name, list(e.param.shape), e.rank, e.way] for e in opt._weights.plan.entries]
