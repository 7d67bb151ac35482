"""Bad input to activation noise: one clear error each, weights as before, the next step works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_activation_contract import BASE, WORDS, data
from tiny_models import build, same_bits, snapshot
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero, label_words, next_token

WORD_LOSS = label_words(WORDS)


def by_example(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda b: model(b["input_ids"]).logits.sin().mean((1, 2))


def sliced(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Any]:
    """An objective whose losses have the shape ``make`` gives them."""
    return lambda model: lambda b: make(model(b["input_ids"]).logits.sin().mean(-1))


MASK = torch.ones(3, 7, dtype=torch.bool)
PLAIN = {"input_ids": data()["input_ids"]}

# what is wrong: batch, objective of the model, positions, options, error, its text
STEPS: dict[str, tuple[Any, Any, Any, dict[str, Any], type[Exception], str]] = {
    "closure": (lambda: 1.0, None, None, {}, TypeError, "objective: .*got a closure"),
    "objective": (data(), lambda m: 3, None, {}, TypeError, "objective: expected a callable"),
    "scalar": (data(), sliced(lambda x: x.mean()), MASK, {}, ValueError, r"objective: .*\(9,\)"),
    "too few": (data(), sliced(lambda x: x[:-1, 0]), MASK, {}, ValueError, r"objective: .*\(9,\)"),
    "short": (data(), sliced(lambda x: x[:, :-1]), MASK, {}, ValueError, r"objective: .*\(9, 7\)"),
    "a number": (data(), sliced(lambda x: 1.0), MASK, {}, ValueError, "objective: .*got float"),
    "logits": (
        data(), lambda m: LogitsLoss(lambda x, b: x[:, :, 0].sum()), MASK, {}, ValueError,
        "objective: .*got",
    ),
    "neither": (PLAIN, by_example, None, {}, ValueError, "positions: .*neither.*where='all'"),
    "neither, logits": (
        PLAIN, lambda m: LogitsLoss(lambda x, b: x.mean((1, 2))), None, {}, ValueError,
        "positions: .*neither",
    ),
    "no position": (data(), by_example, ~MASK, {}, ValueError, "positions: .*at least one"),
    "padding only": (
        data(), by_example, data()["attention_mask"] == 0, {}, ValueError, "positions: .*one real",
    ),
    "wide": (data(), by_example, MASK[:, :5], {}, ValueError, r"positions: .*\(3, 7\).*\(3, 5\)"),
    "one row": (data(), by_example, MASK[0], {}, ValueError, "positions: .*shape"),
    "a list": (data(), by_example, [MASK, MASK], {}, ValueError, "positions: .*one mask for each"),
    "no tensor": (data(), by_example, "last", {}, TypeError, "positions: expected a mask tensor"),
    "no batch": ([], by_example, None, {}, ValueError, "batch: .*empty list"),
    "no mapping": (MASK.long(), lambda m: WORD_LOSS, None, {}, TypeError, "batch: .*mapping"),
    "one norm": ({k: v[:1] for k, v in data().items()}, lambda m: WORD_LOSS, None,
                 dict(rule="norm"), ValueError, "queries: .*two differences.*rule='norm'"),
    "one muon": ({k: v[:1] for k, v in data().items()}, lambda m: WORD_LOSS, None,
                 dict(rule="muon"), ValueError, "queries: .*two differences.*rule='muon'"),
    "one adam": ({k: v[1:2] for k, v in data().items()}, by_example, MASK[:1],
                 dict(rule="adam"), ValueError, "queries: .*two differences.*rule='adam'"),
    "one micro-batch of tokens": (
        [data(), data()], lambda m: flips(m), [MASK, MASK], {}, ValueError, "objective: .*one kind",
    ),
}  # fmt: skip


def flips(model: nn.Module) -> Any:
    """Losses an example for the first micro-batch, a token for the second."""
    kinds = iter((True, False, True, False))

    def loss(b: Any) -> Tensor:
        each = model(b["input_ids"]).logits.sin().mean(-1)
        return each.mean(1) if next(kinds) else each

    return loss


@pytest.mark.parametrize("form", ["core", "right", "full"])
@pytest.mark.parametrize("case", STEPS)
def test_a_bad_step_changes_nothing(case: str, form: str) -> None:
    """Before any step, and after some: the same weights, state and counters as without it."""
    batch, objective, positions, options, error, text = STEPS[case]
    options = {**BASE, "form": form, "queries": 1 if "rule" in options else 2, **options}
    finals = []
    for bad in (True, False):
        model = build("llama")
        opt = SubZero(model, **options)
        for steps in (0, 1):
            if bad:
                before, counters = snapshot(model), (opt.steps, opt.draws, opt.window)
                values = [s.value.clone() for _, s in opt._weights.spaces()]
                made = None if objective is None else objective(model)
                with pytest.raises(error, match=text):
                    opt.step(batch, made, positions)
                assert same_bits(model, before)
                assert counters == (opt.steps, opt.draws, opt.window)
                for value, (_, s) in zip(values, opt._weights.spaces(), strict=True):
                    assert torch.equal(value, s.value)
                assert all(not t.kept and not t.recent for t in opt._weights.taps)
            opt.step(data(seed=steps), WORD_LOSS)
        with torch.no_grad():
            finals.append(model(data()["input_ids"]).logits)
    assert torch.equal(finals[0], finals[1])


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(sides="two"), "sides: .*'two'"),
        (dict(rank=33), r"rank: expected at most \d+ = min\(m, n\) of model.layers.0"),
        (dict(rank=33, form="core"), "rank: expected at most"),
        (dict(discount=1.5), "discount: "),
        (dict(discount=-0.1), "discount: "),
        (dict(discount=float("nan")), "discount: "),
        (dict(discount="0"), "discount: "),
        (dict(form="left"), "form: "),
        (dict(credit="all"), "credit: "),
        (dict(where="tokens"), "where: "),
        (dict(rule="lion"), "rule: "),
        (dict(apply="in_place"), "apply: "),
        (dict(reshape="square"), "reshape: "),
        (dict(noise="weight", form="core"), "form: .*noise='activation'"),
        (dict(noise="weight", credit="own"), "credit: .*noise='activation'"),
        (dict(noise="weight", where="all"), "where: .*noise='activation'"),
        (dict(noise="weight", discount=0.5), "discount: .*noise='activation'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], text: str) -> None:
    """Before anything is attached: the model can be given to another optimizer at once."""
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        SubZero(model, **{**BASE, **options})
    assert same_bits(model, before)
    SubZero(model, **BASE)


def test_form_full_takes_any_rank() -> None:
    """It has no basis: rank is ignored, and so is apply."""
    opt = SubZero(build("llama"), **{**BASE, "form": "full", "rank": 500, "apply": "in_place"})
    assert opt.step(data(), WORD_LOSS).isfinite()


def test_a_model_without_a_linear_to_credit() -> None:
    model = build("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    with pytest.raises(ValueError, match="model: expected a weight of a Linear.*unfreeze one"):
        SubZero(model, **BASE)
    with pytest.raises(ValueError, match="model: expected a weight of a Linear"):
        SubZero(nn.Sequential(nn.Linear(4, 4)), **{**BASE, "rank": 2})
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: "):
        SubZero(model, **BASE)


def test_an_objective_that_raises_leaves_no_trace() -> None:
    """In the clean forward, and among the queries; whole groups and rows."""
    calls = [0]

    def breaks(at: int) -> LogitsLoss:
        def fn(logits: Tensor, b: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == at:
                raise RuntimeError("out of memory")
            return WORD_LOSS.fn(logits, b)

        return LogitsLoss(fn, WORD_LOSS.positions, tokens=WORDS)

    for at, whole in ((1, False), (2, False), (1, True)):
        model = build("gpt2")
        opt = SubZero(model, **BASE)
        opt.step(data(), WORD_LOSS)
        if whole:
            opt._queries._decoder = None
        implementation = model.config._attn_implementation
        with torch.no_grad():
            before = model(data()["input_ids"]).logits
        calls[0] = 0
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step(data(), breaks(at))
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            assert torch.equal(model(data()["input_ids"]).logits, before)
        assert opt.steps == 1 and opt.step(data(), next_token_only(model)).isfinite()


def next_token_only(model: nn.Module) -> LogitsLoss:
    plain = next_token()
    assert callable(plain.positions)
    return plain


def test_a_linear_that_sees_other_rows_is_named() -> None:
    """One that runs twice, or on a part of the batch, cannot be credited row by row."""
    model = build("llama")
    up = model.model.layers[0].mlp.up_proj
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda m, args: (up(args[0]), None)[1]
    )
    opt = SubZero(model, **BASE)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: .*once in a forward"):
        opt.step(data(), WORD_LOSS)
    handle.remove()
    handle = up.register_forward_pre_hook(lambda m, args: (args[0][:, :3],))
    with pytest.raises(ValueError, match=r"up_proj\.weight: expected 1 groups of 21 rows"):
        opt.step(data(), WORD_LOSS)
    handle.remove()
    assert opt.step(data(), WORD_LOSS).isfinite()


def test_bases_from_needs_activation_noise() -> None:
    with pytest.raises(ValueError, match="bases_from: .*noise='weight'"):
        SubZero(build("llama"), rank=3).bases_from(data(), WORD_LOSS)
    opt = SubZero(build("llama"), **BASE)
    with pytest.raises(ValueError, match="positions: .*neither"):
        opt.bases_from(PLAIN, by_example(opt.model))
    with pytest.raises(ValueError, match="batch: "):
        opt.bases_from([], WORD_LOSS)
    assert opt._weights.tensors() == {}
