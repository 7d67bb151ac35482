"""What SubZero may be asked for, checked in one place before anything is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .plan import RESHAPES
from .rules import RULES

CHOICES = {
    "sides": ("auto", "one", "two"),
    "rule": tuple(RULES),
    "apply": ("forward", "in_place"),
    "noise": ("weight",),
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

    @property
    def two_sided(self) -> bool:
        return self.sides != "one"

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
    if given["rule"] == "norm" and given["queries"] < 4:
        raise ValueError(
            f"queries: expected at least 4 with rule='norm', which divides by the losses' std, "
            f"got {given['queries']}; raise queries or take rule='sgd'"
        )
    return Options(**given)


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
        ok = isinstance(value, (int, float)) or getattr(value, "numel", lambda: 0)() == 1
        if not ok or not math.isfinite(value) or value < low or (open_low and value == low):
            bound = "above 0" if open_low else "of at least 0"
            raise ValueError(f"{name}: expected a finite number {bound}, got {value!r}")
    if group["momentum"] >= 1:
        raise ValueError(f"momentum: expected a number below 1, got {group['momentum']!r}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
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
