"""The param group's numbers on the device, where kernels and captured graphs read them.

A scheduler changes ``lr`` between two steps; the next step, captured or not, must see it and must
not wait for the device. A number that changed is passed to a kernel that stores it: nothing is
copied from the host. Steps read the same 0-d tensors whether they are captured or not, since a
division by a tensor and one by a Python number differ in the last bit on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NAMES = ("lr", "eps", "momentum", "beta1", "beta2", "adam_eps", "weight_decay")


@dataclass(frozen=True)
class Hyper:
    """What the param group says now: 0-d float64 tensors on the device."""

    lr: Tensor
    eps: Tensor
    momentum: Tensor
    betas: tuple[Tensor, Tensor]
    adam_eps: Tensor
    weight_decay: Tensor


class Numbers:
    """Keeps ``hyper`` at what the param group says; its tensors stay where they are."""

    def __init__(self, device: torch.device) -> None:
        held = torch.zeros(len(_NAMES), dtype=torch.float64, device=device).unbind()
        self._held = dict(zip(_NAMES, held, strict=True))
        self._stored: dict[str, float] = {}
        self.single: set[str] = set()  # rounded to fp32, as a trajectory writes them
        lr, eps, momentum, beta1, beta2, adam_eps, weight_decay = held
        self.hyper = Hyper(lr, eps, momentum, (beta1, beta2), adam_eps, weight_decay)

    def follow(self, group: dict[str, Any]) -> None:
        """Store what changed. A number that is a tensor on the device is copied there."""
        beta1, beta2 = group["betas"]
        flat: dict[str, Any] = {**group, "beta1": beta1, "beta2": beta2}
        for name, held in self._held.items():
            value = flat[name]
            if on_device(value):
                held.copy_(value.reshape(()).float() if name in self.single else value.reshape(()))
                self._stored.pop(name, None)
            else:
                self.store(name, float(value))

    def store(self, name: str, value: float) -> None:
        """One number, if it is another than the last."""
        if name in self.single:
            value = float(torch.tensor(value, dtype=torch.float32))
        if self._stored.get(name) != value:
            self._held[name].fill_(value)
            self._stored[name] = value

    @property
    def decays(self) -> bool:
        """Whether there may be weight decay: a number on the device is not read to find out."""
        return self._stored.get("weight_decay") != 0.0


def on_device(value: Any) -> bool:
    """Whether a number is a tensor that cannot be read without waiting for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"
