"""Which method runs and why, what it takes from its recipe, and what its steps cost."""

from __future__ import annotations

import pytest
import torch
from tiny_task import llama, sentences, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from subzero.batches import Encoder, TrainBatches
from subzero.errors import CommandError
from subzero.methods import choose_method, make_method
from subzero.models import choose_trained
from subzero.objectives import label_words, next_token
from subzero.settings import (
    METHODS,
    PAPER,
    RATES,
    RECIPES,
    TEXT,
    TEXT_RATES,
    Settings,
    defaults,
    fill,
    methods_to_try,
    rate_for,
)
from subzero.tasks import Example


def asked(**options):
    return Settings(model="m", output="o", **options)


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture
def model(tok):
    return llama(len(tok))


def batches_of(model, tok, count=1):
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    stream = iter(TrainBatches(Encoder(tok, model), examples, 16, 0))
    return [next(stream) for _ in range(count)]


# the recipe


@pytest.mark.parametrize("method", METHODS)
def test_what_is_given_wins_and_the_rest_is_the_recipe(method):
    filled = fill(asked(lr=0.5, steps=7), method, labelled=True)
    assert filled.method == method and filled.lr == 0.5 and filled.steps == 7
    for name, value in RECIPES[method].items():
        if name not in ("lr", "steps"):
            assert getattr(filled, name) == value, name
    assert filled.eval_every == 2  # a fifth, rounded up
    assert fill(filled, method, labelled=True) == filled
    # what the method does not know stays open
    assert (filled.rank is None) == (method in ("mezo", "adamw"))


def test_language_modelling_has_its_own_queries():
    assert fill(asked(), "activation", labelled=True).queries == 32
    assert fill(asked(), "activation", labelled=False).queries == 4
    assert fill(asked(queries=9), "activation", labelled=False).queries == 9


@pytest.mark.parametrize("method", METHODS)
def test_rates_follow_the_length(method):
    """What help shows is the rate at the recipe's own length; a longer run takes no higher one."""
    assert fill(asked(), method, labelled=True).lr == RECIPES[method]["lr"]
    rates = [fill(asked(steps=n), method, labelled=True).lr for n in (1, 54, 167, 785, 5000, 10**6)]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    assert rates[0] == max(RATES[method].values())
    for steps, lr in RATES[method].items():
        assert rate_for(RATES[method], steps) == pytest.approx(lr, rel=0.25)


def test_language_modelling_has_its_own_rates():
    for method, rates in TEXT_RATES.items():
        for steps, lr in rates.items():
            filled = fill(asked(steps=steps), method, labelled=False)
            assert filled.lr == pytest.approx(lr, rel=0.25), (method, steps)
    assert fill(asked(), "activation", labelled=False).lr == TEXT["activation"]["lr"]
    assert fill(asked(), "weight", labelled=False).lr < fill(asked(), "weight", labelled=True).lr
    assert fill(asked(paper=True), "weight", labelled=False).lr == 1e-6


def test_rates_between_are_on_a_line_of_logarithms():
    assert rate_for({10: 1e-1, 1000: 1e-3}, 100) == 1e-2
    assert rate_for({10: 1e-1, 1000: 1e-3}, 50) == 2e-2  # 1 / 50
    assert rate_for({10: 1e-1, 1000: 1e-3}, 200) == 5e-3  # 1 / 200


def test_long_runs_have_more_row_queries():
    for steps, queries in ((100, 32), (784, 32), (785, 64)):
        assert fill(asked(steps=steps), "activation", labelled=True).queries == queries
    assert fill(asked(steps=785), "activation", labelled=False).queries == 4
    assert fill(asked(steps=785, queries=9), "activation", labelled=True).queries == 9
    assert fill(asked(steps=785), "weight", labelled=True).queries == 8


def test_the_papers_recipe():
    filled = fill(asked(paper=True, steps=5), "weight", labelled=True)
    for name, value in {**RECIPES["weight"], **PAPER, "steps": 5}.items():
        assert getattr(filled, name) == value
    assert filled.queries == 1 and filled.sides == "two" and filled.rule == "sgd"


def test_sixteen_bit_weights_get_noise_above_their_rounding():
    assert fill(asked(), "activation", labelled=True).eps == 1e-3
    assert fill(asked(dtype="bfloat16"), "activation", labelled=True).eps == 3e-2
    assert fill(asked(dtype="bfloat16", eps=2e-2), "activation", labelled=True).eps == 2e-2
    assert fill(asked(dtype="bfloat16"), "weight", labelled=True).eps == 1e-3


def test_defaults_as_help_shows_them():
    assert defaults("train_layers") == "upper"
    assert defaults("lr") == "activation/weight 0.03, mezo/adamw 0.0001"
    assert defaults("momentum") == "activation/weight 0.9"


# the choice


@pytest.mark.parametrize(
    ("options", "tries", "why"),
    [
        ({}, ["activation", "weight"], "the default where the model allows it"),
        (dict(rank=4), ["activation", "weight"], "the default where the model allows it"),
        (dict(method="mezo"), ["mezo"], "--method mezo"),
        (dict(paper=True), ["weight"], "--paper"),
        (dict(form="core"), ["activation"], "--form is not for noise on weights"),
        (dict(train_norms=True), ["weight"], "--train-norms is not for noise on activations"),
    ],
)
def test_methods_to_try(options, tries, why):
    assert methods_to_try(asked(**options)) == (tries, why)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="sgd"), "--method: expected one of auto, activation, weight, mezo, adamw"),
        (dict(method="adamw", eps=1e-3), "--eps: expected only with --method activation or weight"),
        (dict(method="activation", sides="two"), "--sides: expected only with --method weight"),
        (dict(form="core", sides="two"), "--form: expected only with --method activation, got it"),
        (dict(paper=True, form="core"), r"got it with method weight \(--paper\)"),
        (dict(paper=True, method="activation"), "--paper: expected weight noise"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(CommandError, match=message):
        methods_to_try(asked(**options))


def test_activation_noise_is_the_default(model):
    settings, method, trained, why = choose_method(asked(), model, labelled=True)
    assert settings.method == "activation" and settings.form == "core"
    assert settings.rank == 32  # the recipe's 64, cut to the model's width
    assert why == "SubZero, noise on activations (the default where the model allows it)"
    assert "model.layers 2-3 of 4 (down_proj, o_proj)" in trained
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    writers = ("self_attn.o_proj", "mlp.down_proj")
    assert names == {f"model.layers.{i}.{leaf}.weight" for i in (2, 3) for leaf in writers}
    assert "credit block" in method.plan_summary()
    method.detach()


def test_a_model_that_does_not_allow_it_gets_weight_noise_and_the_reason(tok):
    small = llama(len(tok), hidden_size=16, intermediate_size=32, num_key_value_heads=4)
    settings, method, trained, why = choose_method(asked(rank=32), small, labelled=True)
    assert settings.method == "weight" and settings.rule == "norm" and settings.rank == 32
    assert why.startswith("SubZero, noise on weights (not on activations: rank: expected at most")
    assert "q_proj" not in trained and "model.layers 2-3 of 4: " in trained
    assert small.model.layers[2].self_attn.q_proj.weight.requires_grad
    method.detach()
    with pytest.raises(CommandError, match="optimizer: rank: expected at most 16"):
        choose_method(asked(method="activation", rank=32), small, labelled=True)


def test_errors_of_the_last_method_tried_are_the_users(model):
    with pytest.raises(CommandError, match="optimizer: rank: expected an integer of at least 1"):
        choose_method(asked(rank=0), model, labelled=True)
    with pytest.raises(CommandError, match="expected layers from 0 to 3"):
        choose_method(asked(train_layers="9"), model, labelled=True)


def test_modules_by_name(tok):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4))
    text = choose_trained(gpt2, "all", modules="residual")
    names = {n for n, p in gpt2.named_parameters() if p.requires_grad}
    assert "(c_proj)" in text and len(names) == 4
    assert all(n.endswith("c_proj.weight") for n in names)
    choose_trained(gpt2, "1", norms=True, modules="c_attn, c_fc")
    names = {n for n, p in gpt2.named_parameters() if p.requires_grad and p.dim() > 1}
    assert names == {"transformer.h.1.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"}
    assert gpt2.transformer.h[1].ln_1.weight.requires_grad
    with pytest.raises(CommandError, match="no module 'o_proj' in these layers; expected all, res"):
        choose_trained(gpt2, "all", modules="o_proj,c_fc")
    gpt2.transformer.h[0].attn.c_proj = torch.nn.Identity()
    gpt2.transformer.h[0].mlp.c_proj = torch.nn.Identity()
    with pytest.raises(CommandError, match="known to write to the residual stream; name some of"):
        choose_trained(gpt2, "0", modules="residual")


# the cost


def rows_seen(model, batch, objective, steps):
    """Token rows that go through each block in steps, over those of one forward through all."""
    rows = [0] * len(model.model.layers)
    handles = [
        block.mlp.down_proj.register_forward_hook(
            lambda _, args, __, i=i: rows.__setitem__(i, rows[i] + args[0][..., 0].numel())
        )
        for i, block in enumerate(model.model.layers)
    ]
    steps()
    for handle in handles:
        handle.remove()
    return sum(rows) / (len(rows) * batch["input_ids"].numel())


@pytest.mark.parametrize(
    ("options", "labelled"),
    [
        (dict(method="activation", rank=16), True),
        (dict(method="activation", rank=16, credit="own", train_layers="1-3", queries=5), True),
        (dict(method="activation", rank=16, where="all", queries=3), True),
        (dict(method="activation", rank=16), False),
        (dict(method="weight"), True),
        (dict(method="weight", sides="two", queries=4, train_layers="3"), True),
        (dict(method="weight", train_embeddings=True), True),
        (dict(method="weight", apply="in_place"), True),
        (dict(method="mezo"), True),
    ],
)
def test_the_cost_of_a_step_is_the_rows_its_blocks_see(model, tok, options, labelled):
    settings = asked(**options)
    settings = fill(settings, settings.method, labelled)
    settings, method, _, _ = choose_method(settings, model, labelled)
    first, batch = batches_of(model, tok, 2)
    if not labelled:
        first.pop("labels")
        batch.pop("labels")
    objective = label_words([5, 9]) if labelled else next_token()
    method.prepare([first], objective)
    # the first step also tries whether decoded rows serve, on padded and on other batches
    for some in (first, batch):
        method.step(some, objective)
    counted = rows_seen(model, batch, objective, lambda: method.step(batch, objective))
    assert method.forwards(batch, objective) == pytest.approx(counted)
    method.detach()


def test_bases_are_looked_for_where_there_are_any(model, tok):
    batches = batches_of(model, tok, 4)
    for form, cost in (("right", 4.0), ("core", 4.0), ("full", 0.0)):
        _, method, _, _ = choose_method(asked(form=form), model, labelled=True)
        assert method.prepare(batches, label_words([5, 9])) == cost
        method.detach()
    _, method, _, _ = choose_method(asked(method="adamw"), model, labelled=True)
    assert method.prepare(batches, label_words([5, 9])) == 0.0
    assert method.forwards(batches[0], label_words([5, 9])) == 3.0


# AdamW


def test_adamw_is_torchs_on_the_gradient_of_the_mean(tok):
    model, plain = (llama(len(tok)).double() for _ in range(2))
    for some in (model, plain):
        choose_trained(some, "upper")
    (batch,) = batches_of(model, tok)
    method = make_method(fill(asked(method="adamw", weight_decay=0.1), "adamw", True), model)
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.1
    )
    for _ in range(2):
        loss = method.step(batch, label_words([5, 9]))
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        want = torch.nn.functional.cross_entropy(logits[:, -1, [5, 9]], batch["labels"])
        want.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss - want) < 1e-6
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)
        assert p.grad is None


def test_adamw_skips_what_is_not_finite(model, tok):
    choose_trained(model, "upper")
    (batch,) = batches_of(model, tok)
    method = make_method(fill(asked(method="adamw"), "adamw", True), model)
    before = [p.detach().clone() for p in model.parameters()]
    bad = label_words([5, 9])
    inner = bad.fn
    bad.fn = lambda logits, batch: inner(logits, batch) * float("inf")
    assert not torch.isfinite(method.step(batch, bad))
    assert method.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    method.step(batch, label_words([5, 9]))
    assert method.skipped == 1
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
