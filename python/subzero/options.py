"""What SubZero may be asked for, checked in one place before anything is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .credit import CREDITS, FORMS
from .hyper import on_device
from .plan import RESHAPES
from .rules import RULES

CHOICES = {
    "sides": ("auto", "one", "two"),
    "rule": tuple(RULES),
    "apply": ("forward", "in_place"),
    "noise": ("weight", "activation"),
    "form": FORMS,
    "credit": CREDITS,
    "where": ("loss", "all"),
    "state_at_refresh": ("reset", "keep"),
    "fold_rounding": ("auto", "nearest", "stochastic"),
    "reshape": RESHAPES,
}


@dataclass(frozen=True)
class Options:
    """The choices that stay fixed for the life of the optimizer."""

    rank: int
    refresh_every: int
    queries: int
    sides: str
    rule: str
    apply: str
    seed: int
    noise: str
    state_at_refresh: str
    fold_rounding: str
    reshape: str
    form: str
    credit: str
    where: str
    discount: float

    @property
    def activation(self) -> bool:
        return self.noise == "activation"

    @property
    def two_sided(self) -> bool:
        return self.sides == "two" or (self.sides == "auto" and not self.activation)

    @property
    def groups(self) -> int:
        """Evaluations of a step: +0, -0, +1, -1, ... or baseline, 0, 1, ...."""
        return 2 * self.queries if self.two_sided else self.queries + 1

    def signs(self) -> list[tuple[int | None, int]]:
        """(query, sign) of every group; the baseline has no query."""
        if self.two_sided:
            return [(k, sign) for k in range(self.queries) for sign in (1, -1)]
        return [(None, 0), *((k, 1) for k in range(self.queries))]


def check(**given: Any) -> Options:
    """Options from the constructor's arguments, or one error that names the argument."""
    for name in ("rank", "refresh_every", "queries"):
        _integer(name, given[name], 1)
    _integer("seed", given["seed"], -(1 << 63), (1 << 63) - 1)
    for name, choices in CHOICES.items():
        if given[name] not in choices:
            raise ValueError(
                f"{name}: expected one of {', '.join(map(repr, choices))}, got {given[name]!r}"
            )
    discount = given["discount"]
    if not isinstance(discount, (int, float)) or not 0 <= discount <= 1:
        raise ValueError(f"discount: expected a number from 0 to 1, got {discount!r}")
    if given["noise"] == "activation":
        _check_activation(given)
    else:
        _check_weight(given)
    return Options(**given)


def _check_weight(given: dict[str, Any]) -> None:
    for name, default in (
        ("form", "right"), ("credit", "block"), ("where", "loss"), ("discount", 0.0),
    ):  # fmt: skip
        if given[name] != default:
            raise ValueError(
                f"{name}: expected its default {default!r} with noise='weight', got "
                f"{given[name]!r}; take noise='activation'"
            )
    if given["rule"] in ("norm", "muon") and given["queries"] < 4:
        raise ValueError(
            f"queries: expected at least 4 with rule={given['rule']!r}, which divides by the "
            f"losses' std, got {given['queries']}; raise queries or take rule='sgd'"
        )


def _check_activation(given: dict[str, Any]) -> None:
    if given["sides"] == "two":
        raise ValueError(
            "sides: expected 'auto' or 'one' with noise='activation', whose queries share one "
            "clean evaluation, got 'two'; leave it out"
        )
    if given["apply"] == "in_place" and given["form"] != "full":
        raise ValueError(
            "apply: expected 'forward' with noise='activation', got 'in_place'; take form='full' "
            "to write the weights in each step"
        )
    if given["reshape"] not in ("auto", "none"):
        raise ValueError(
            f"reshape: expected 'auto' or 'none' with noise='activation', got "
            f"{given['reshape']!r}; a linear's noise has the shape of its own output"
        )


def check_group(group: dict[str, Any]) -> None:
    """The numbers of the param group, which schedulers may have changed."""
    for name, low, open_low in (
        ("lr", 0.0, False),
        ("eps", 0.0, True),
        ("momentum", 0.0, False),
        ("adam_eps", 0.0, True),
        ("weight_decay", 0.0, False),
    ):
        value = group[name]
        if on_device(value) and value.numel() == 1:  # reading it would wait for the device
            continue
        ok = isinstance(value, (int, float)) or getattr(value, "numel", lambda: 0)() == 1
        if not ok or not math.isfinite(value) or value < low or (open_low and value == low):
            bound = "above 0" if open_low else "of at least 0"
            raise ValueError(f"{name}: expected a finite number {bound}, got {value!r}")
    if not on_device(group["momentum"]) and group["momentum"] >= 1:
        raise ValueError(f"momentum: expected a number below 1, got {group['momentum']!r}")
    betas = group["betas"]
    if len(betas) != 2 or not all(on_device(b) or 0 <= b < 1 for b in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high and value > high)
    ):
        bound = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {bound}, got {value!r}")
