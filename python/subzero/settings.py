"""Every choice of a training run, the recipe of each method, and what run.json records."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .errors import CommandError

METHODS = {
    "activation": "SubZero, noise on activations",
    "weight": "SubZero, noise on weights",
    "mezo": "MeZO",
    "adamw": "AdamW, with backpropagation",
}

_STATE = dict(
    momentum=0.9, beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0,
    state_at_refresh="reset", fold_rounding="auto",
)  # fmt: skip
_UPPER = dict(
    train_layers="upper", train_modules="all", train_embeddings=False, train_norms=False
)  # fmt: skip

# What each method takes where the user says nothing; docs/recipes.md says where it is from. An
# option that a recipe does not name does not fit the method, and is an error.
RECIPES: dict[str, dict[str, Any]] = {
    "activation": dict(
        train_layers="upper", train_modules="residual", steps=100, schedule="cosine",
        lr=3e-2, eps=1e-3, queries=32, rule="muon", rank=64, refresh_every=25,
        form="core", credit="block", where="loss", discount=0.0, **_STATE,
    ),
    "weight": dict(
        **_UPPER, steps=60, schedule="cosine",
        lr=3e-2, eps=1e-3, queries=8, rule="norm", rank=16, refresh_every=1000,
        sides="one", apply="forward", reshape="auto", **_STATE,
    ),
    "mezo": dict(**_UPPER, steps=5_000, schedule="cosine", lr=1e-4, eps=1e-3),
    "adamw": dict(
        **_UPPER, steps=100, schedule="cosine",
        lr=1e-4, beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0,
    ),
}  # fmt: skip

# Where language modelling differs: every token carries noise of its own, and a query costs a
# forward of the upper half instead of one row.
TEXT: dict[str, dict[str, Any]] = {"activation": dict(queries=4, lr=5e-3)}

# Learning rates of the study by steps, with cosine schedules (docs/recipes.md); other lengths take
# one in between. From LONG steps on it had more row queries.
RATES: dict[str, dict[int, float]] = {
    "activation": {54: 4e-2, 167: 2e-2, 785: 3e-3, 3937: 1.3e-3},
    "weight": {20: 3e-2, 60: 3e-2, 400: 1e-2},
    "mezo": {50: 1e-3, 150: 1e-3, 1000: 3e-4, 5000: 1.3e-4},
    "adamw": {33: 3e-4, 100: 1e-4, 667: 3e-5, 3333: 1.3e-5},
}
# Where language modelling chose others: at SST-2's 3e-2 weight noise ends above the untrained loss.
TEXT_RATES: dict[str, dict[int, float]] = {
    "activation": {34: 5e-3, 100: 5e-3, 667: 2e-3},
    "weight": {20: 1e-2, 400: 1e-2},
    "mezo": {50: 3e-4, 1000: 3e-4, 5000: 1.3e-4},
    "adamw": {33: 3e-4, 100: 3e-4, 667: 3e-5, 3333: 1.3e-5},
}
LONG, LONG_QUERIES = 785, 64

# Where 16-bit weights differ: rounding hides small noise. Correlation of the losses' differences
# with fp32's (benchmarks/results/learning_precision.csv): bf16 0.33 at 1e-3, 0.96 at 1e-2, 0.995
# at 3e-2; on SST-2 eps up to 1e-1 learns as well as 1e-3 (docs/recipes.md).
SIXTEEN_BIT: dict[str, dict[str, Any]] = {"activation": dict(eps=3e-2)}

# --paper, over the recipe of weight noise: one two-sided query and plain SGD on all parameters, as
# arXiv 2410.08989 writes it.
PAPER: dict[str, Any] = dict(
    train_layers="all", train_embeddings=True, train_norms=True, steps=10_000, schedule="constant",
    lr=1e-6, queries=1, sides="two", rule="sgd", rank=64,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One run of ``subzero train``. What is None is filled from the recipe of the method."""

    model: str
    output: str
    method: str = "auto"
    paper: bool = False
    # task and data
    task: str | None = None
    data: str | None = None
    data_split: str = "train"
    template: str | None = None
    label_words: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    train_examples: int = 1000
    dev_examples: int = 200
    test_examples: int = 500
    split_seed: int = 0
    max_tokens: int = 256
    # model
    train_layers: str | None = None
    train_modules: str | None = None
    train_embeddings: bool | None = None
    train_norms: bool | None = None
    dtype: str = "float32"
    device: str = "auto"
    # training
    steps: int | None = None
    batch_size: int = 16
    eval_every: int | None = None
    schedule: str | None = None
    seed: int = 0
    max_minutes: float | None = None
    # optimizer
    lr: float | None = None
    eps: float | None = None
    queries: int | None = None
    rule: str | None = None
    rank: int | None = None
    refresh_every: int | None = None
    form: str | None = None
    credit: str | None = None
    where: str | None = None
    discount: float | None = None
    sides: str | None = None
    apply: str | None = None
    momentum: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    adam_eps: float | None = None
    weight_decay: float | None = None
    state_at_refresh: str | None = None
    fold_rounding: str | None = None
    reshape: str | None = None
    # output
    overwrite: bool = False


def methods_to_try(s: Settings) -> tuple[list[str], str]:
    """The methods that may run, the preferred one first, and why these.

    ``--method auto`` is activation noise where the model allows it, else weight noise, unless an
    option that the user gave fits only one of the two.

    Raises:
        CommandError: an unknown method, or options that do not fit it.
    """
    if s.method != "auto" and s.method not in METHODS:
        raise CommandError(
            f"--method: expected one of auto, {', '.join(METHODS)}, got {s.method!r}"
        )
    if s.paper and s.method not in ("auto", "weight"):
        raise CommandError(
            f"--paper: expected weight noise, the paper's method, got --method {s.method}; "
            "leave one of the two out"
        )
    given = [name for name in _names() if getattr(s, name) is not None]
    tries, why = ["activation", "weight"], "the default where the model allows it"
    other = {m: [n for n in given if n not in RECIPES[m]] for m in tries}
    if s.paper:
        tries, why = ["weight"], "--paper"
    elif s.method != "auto":
        tries, why = [s.method], f"--method {s.method}"
    elif other["activation"]:
        tries, why = ["weight"], f"{_flag(other['activation'][0])} is not for noise on activations"
    elif other["weight"]:
        tries, why = ["activation"], f"{_flag(other['weight'][0])} is not for noise on weights"
    for name in given:
        for method in tries:
            if name not in RECIPES[method]:
                fits = " or ".join(m for m, recipe in RECIPES.items() if name in recipe)
                raise CommandError(
                    f"{_flag(name)}: expected only with --method {fits}, got it with method "
                    f"{method} ({why}); leave it out, or change the method"
                )
    return tries, why


def fill(s: Settings, method: str, labelled: bool) -> Settings:
    """Settings of one method in which everything that fits it has a value; what was given stays.

    Args:
        labelled: whether the task has label words; else it is language modelling.
    """
    recipe = dict(RECIPES[method])
    steps = recipe["steps"] if s.steps is None else s.steps
    rates = RATES[method]
    if method == "activation" and steps >= LONG:
        recipe["queries"] = LONG_QUERIES
    if not labelled:
        recipe.update(TEXT.get(method, {}))
        rates = TEXT_RATES.get(method, rates)
    recipe["lr"] = rate_for(rates, steps)
    if s.dtype != "float32":
        recipe.update(SIXTEEN_BIT.get(method, {}))
    if s.paper:
        recipe.update(PAPER)
    missing = {name: value for name, value in recipe.items() if getattr(s, name) is None}
    filled = replace(s, method=method, **missing)
    assert filled.steps is not None
    if filled.eval_every is None:
        filled = replace(filled, eval_every=max(1, math.ceil(filled.steps / 5)))
    return filled


def rate_for(rates: dict[int, float], steps: int) -> float:
    """The learning rate of a run of so many steps, to one digit: the study's lie no closer.

    On a straight line between two of the study's on logarithmic scales, beyond them the nearest.
    """
    known = sorted(rates)
    steps = min(max(steps, known[0]), known[-1])
    below = max(n for n in known[:-1] if n <= steps)
    above = known[known.index(below) + 1]
    way = math.log(steps / below) / math.log(above / below)
    return float(f"{rates[below] ** (1 - way) * rates[above] ** way:.0e}")


def defaults(name: str) -> str:
    """The recipes' values of an option as text: "activation/weight 0.03, mezo 1e-05"."""
    values = {m: _shown(r[name]) for m, r in RECIPES.items() if name in r}
    if len(values) == len(RECIPES) and len(set(values.values())) == 1:
        return values["weight"]
    by_value: dict[str, list[str]] = {}
    for method, value in values.items():
        by_value.setdefault(value, []).append(method)
    return ", ".join(f"{'/'.join(methods)} {value}" for value, methods in by_value.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _names() -> list[str]:
    """Options that some recipe has."""
    return list(dict.fromkeys(name for recipe in RECIPES.values() for name in recipe))
