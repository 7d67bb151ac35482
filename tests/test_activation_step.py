"""Whole steps of activation noise against an implementation of their own, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activation_oracle import Micro, Oracle, micro
from tiny_models import build
from torch import Tensor, nn

from subzero import SubZero, label_words, next_token
from subzero_kernels.backends import VARIABLE

FORMS, CREDITS = ("core", "right", "full"), ("own", "block")
RULES = ("sgd", "norm", "muon", "momentum", "adam")
WORDS = [5, 11, 17, 23]
BASE: dict[str, Any] = dict(eps=1e-3, rank=4, queries=3, seed=7)
# no number that fp32 holds: every factor of a float64 step is a float64 one
LR = dict(sgd=0.07, norm=0.06, muon=0.013, momentum=0.03, adam=0.0021)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native normals may differ from the oracle's by 4 ulp, and so would bases made of them."""
    monkeypatch.setenv(VARIABLE, "reference")


def data(examples: int, tokens: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Padded on the left in the first example and on the right in the last one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 96, (examples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[-1, -1:] = 0
    labels = torch.randint(0, len(WORDS), (examples,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def forward(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return model(**{k: v for k, v in b.items() if k != "labels"}).logits


def by_example(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    """Cross entropy of a label word at the last real token."""
    real = b["attention_mask"]
    last = (real * torch.arange(1, real.shape[1] + 1)).argmax(1)
    logits = forward(model, b)[torch.arange(len(last)), last][:, WORDS]
    return F.cross_entropy(logits, b["labels"], reduction="none")


def by_token(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    """Cross entropy of each token's successor, zero at the end."""
    losses = F.cross_entropy(
        forward(model, b)[:, :-1].transpose(1, 2), b["input_ids"][:, 1:], reduction="none"
    )
    return F.pad(losses, (0, 1))


def last(b: dict[str, Tensor]) -> Tensor:
    real = b["attention_mask"]
    mask = torch.zeros_like(real, dtype=torch.bool)
    mask[torch.arange(len(real)), (real * torch.arange(1, real.shape[1] + 1)).argmax(1)] = True
    return mask


def before_real(b: dict[str, Tensor]) -> Tensor:
    real = b["attention_mask"].bool()
    return F.pad(real[:, 1:] & real[:, :-1], (0, 1))


def freeze_first_block(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if any(part in name for part in ("layers.0.", "h.0.")):
            p.requires_grad_(False)


def agree(model: nn.Module, oracle: Oracle, start: dict[str, Tensor]) -> None:
    """Changes agree relative to their own size, and nothing else moved."""
    expected = {s.name: (oracle.effective(s), s.transposed) for s in oracle.sites}
    for name, p in model.named_parameters():
        if name not in expected:
            assert torch.equal(p, start[name]), name
            continue
        w, transposed = expected[name]
        wanted = (w.T if transposed else w) - start[name]
        assert wanted.norm() > 1e-6, name
        error = (p.detach() - start[name] - wanted).norm() / wanted.norm()
        assert error < 1e-9, (name, float(error))


def run(
    family: str,
    kind: str,
    logits: bool,
    options: dict[str, Any],
    *,
    steps: int = 3,
    where: str = "loss",
    parts: tuple[int, ...] = (3,),
    like: bool = False,
    decoded: bool | None = None,
    oracle_options: dict[str, Any] | None = None,
) -> None:
    """Both implementations on the same data; ``kind`` is "example" or "token"."""
    model = build(family, dtype=torch.float64)
    freeze_first_block(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = SubZero(model, noise="activation", where=where, **options)
    signs = (lambda i: opt._weights.taps[i].basis) if like else None
    oracle = Oracle(model, like=signs, **{**options, **(oracle_options or {})})
    loss, scored = (by_example, last) if kind == "example" else (by_token, before_real)
    objective: Any = lambda b: loss(model, b)  # noqa: E731
    if logits:
        objective = label_words(WORDS) if kind == "example" else next_token()
    for step in range(steps):
        batches = [data(n, seed=10 * step + i) for i, n in enumerate(parts)]
        micros: list[Micro] = []
        for b in batches:
            first = sum(len(m.batch["input_ids"]) for m in micros)
            micros.append(micro(b, scored(b), first, where == "all"))
        given = batches if len(batches) > 1 else batches[0]
        positions = None if logits else [scored(b) for b in batches]
        returned = opt.step(given, objective, positions)
        wanted = oracle.step(micros, loss)
        assert float(returned) == pytest.approx(wanted, rel=1e-6)
    if decoded is not None:
        assert (opt._queries._decoder is not None) == decoded, opt.plan().whole_groups
    opt.fold()
    oracle.fold()
    agree(model, oracle, start)


CASES = list(itertools.product(FORMS, RULES, ("example", "token 0", "token 0.7")))
FAMILIES = ("llama", "gpt2", "opt")


def options_for(form: str, rule: str, credit: str, **more: Any) -> dict[str, Any]:
    return {
        **BASE, "form": form, "rule": rule, "lr": LR[rule], "credit": credit, "refresh_every": 2,
        "momentum": 0.7, "betas": (0.7, 0.9), "adam_eps": 1e-6, **more,
    }  # fmt: skip


@pytest.mark.parametrize("form, rule, kind", CASES)
def test_steps_equal_the_oracle(form: str, rule: str, kind: str) -> None:
    """Every form, rule and kind of loss over a refresh; both credits, whole groups and rows."""
    number = CASES.index((form, rule, kind))
    kind, _, discount = kind.partition(" ")
    options = options_for(
        form, rule, CREDITS[number % 2], discount=float(discount or 0),
        weight_decay=0.3 if number % 4 else 0.0,
    )  # fmt: skip
    family = FAMILIES[(number // 3) % 3]
    run(family, kind, number // 2 % 2 == 0, options, decoded=True)


@pytest.mark.parametrize("kind", ["example", "token"])
@pytest.mark.parametrize("form, rule", [("core", "muon"), ("right", "sgd"), ("full", "norm")])
def test_noise_everywhere(form: str, rule: str, kind: str) -> None:
    """where="all": every real token is noisy, and credited by the losses that come after it."""
    options = options_for(form, rule, "block", discount=0.5)
    run("llama", kind, form == "core", options, where="all", decoded=False)


@pytest.mark.parametrize("form, rule", [("core", "norm"), ("right", "momentum"), ("full", "muon")])
@pytest.mark.parametrize("kind", ["example", "token"])
@pytest.mark.parametrize("logits", [True, False])
def test_micro_batches(form: str, rule: str, kind: str, logits: bool) -> None:
    """Examples count on, and averages are over all examples or scored tokens of the step."""
    options = options_for(form, rule, "own", discount=0.5)
    run("opt", kind, logits, options, parts=(2, 1, 3), steps=3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["momentum", "muon", "adam"])
def test_state_kept_over_refreshes(form: str, rule: str) -> None:
    """Two refreshes with state_at_refresh="keep"; right turns its momentum into the new basis."""
    options = options_for(form, rule, "block", state_at_refresh="keep", weight_decay=0.3)
    run("llama", "token", True, options, steps=5, like=form != "full")


def test_one_query_of_many_examples_and_many_queries_of_one() -> None:
    """The mean is over both."""
    for queries, parts in ((1, (4,)), (5, (1,))):
        options = options_for("right", "norm", "own") | {"queries": queries}
        run("gpt2", "example", True, options, parts=parts, steps=3)


def test_a_wrong_equation_is_noticed() -> None:
    """The comparison can fail: an oracle with another eps, scale or discount does not agree."""
    for wrong in (dict(eps=1.1e-3), dict(rank=3), dict(discount=0.4), dict(queries=2)):
        options = options_for("right", "sgd", "own", discount=0.5)
        with pytest.raises(AssertionError):
            run("llama", "token", True, options, steps=1, oracle_options=wrong)
