"""MeZO: equal to its plain loop, on the contract's noise, and safe where a loss is not finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import noise
from tiny_models import batch, build, same_bits, snapshot

from subzero import label_words, next_token
from subzero.baselines import MeZO, mean_loss
from subzero_kernels import PURPOSE_DENSE, stream_id

LR, EPS, SEED = 0.03, 1e-3, 11
BATCH = {**batch(), "labels": torch.tensor([0, 1, 1])}
WORDS = [5, 9]


def model_of(name="llama", dtype=torch.float64):
    """Trained: everything but the first block, which still counts in the contract's indices."""
    model = build(name, dtype=dtype)
    for parameter_name, p in model.named_parameters():
        p.requires_grad_("layers.0" not in parameter_name)
    return model


def plain_step(model, objective, step):
    """The loop of the paper in plain torch, on noise made by the test's own generator."""
    z = {
        name: noise(SEED, step, stream_id(PURPOSE_DENSE, index), p.shape).double()
        for index, (name, p) in enumerate(model.named_parameters())
        if p.requires_grad
    }

    @torch.no_grad()
    def move(coefficient):
        for name, p in model.named_parameters():
            if name in z:
                p.add_(coefficient * z[name])

    move(EPS)
    plus = objective(model, BATCH).mean()
    move(-2 * EPS)
    minus = objective(model, BATCH).mean()
    move(EPS - LR * (plus - minus) / (2 * EPS))
    return (plus + minus) / 2


def test_three_steps_are_those_of_the_plain_loop():
    model, plain = model_of("opt"), model_of("opt")  # its norms do not go through fp32
    objective = label_words(WORDS)
    optimizer = MeZO(model, LR, EPS, SEED)
    start = snapshot(model)
    for step in range(3):
        loss = optimizer.step(BATCH, objective)
        assert loss.dtype == torch.float32 and loss.shape == ()
        with torch.no_grad():
            assert abs(loss - plain_step(plain, objective, step)) < 1e-6
    moved = 0.0
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        # the op takes its coefficient in fp32
        change = float((q.detach() - start[name]).abs().max())
        assert torch.allclose(p, q, rtol=0, atol=1e-6 * change + 1e-9)
        moved += change
    assert moved > 1e-2 and optimizer.steps == 3 and optimizer.skipped == 0


def test_the_step_goes_along_the_contracts_noise():
    """Whatever the loss, W moves along z alone, by -lr rho."""
    model = model_of()
    before = snapshot(model)
    slope = 0.7
    values = iter([1 + slope * EPS, 1 - slope * EPS])
    MeZO(model, LR, EPS, SEED).step(lambda: torch.tensor(next(values), dtype=torch.float64))
    for index, (name, p) in enumerate(model.named_parameters()):
        if not p.requires_grad:
            assert torch.equal(p, before[name])
            continue
        z = noise(SEED, 0, stream_id(PURPOSE_DENSE, index), p.shape).double()
        along = ((p - before[name]) * z).sum() / (z * z).sum()
        assert float(along.detach()) == pytest.approx(-LR * slope, rel=1e-3)
        assert torch.allclose(p, before[name] + along * z, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["words", "tokens", "plain", "closure"])
def test_every_kind_of_objective_gives_the_same_direction(kind):
    """Token losses are averaged over the scored tokens, not over the examples."""

    def token_mean(model):
        logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
        mask = BATCH["attention_mask"]
        scored = (mask[:, :-1] * mask[:, 1:]).bool()
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2), BATCH["input_ids"][:, 1:], reduction="none"
        )
        return losses[scored].mean()

    def word_losses(model):
        logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits[
            :, -1, WORDS
        ]
        return F.cross_entropy(logits, BATCH["labels"], reduction="none")

    arguments = {
        "words": lambda m: (BATCH, label_words(WORDS)),
        "tokens": lambda m: ({k: v for k, v in BATCH.items() if k != "labels"}, next_token()),
        "plain": lambda m: (BATCH, lambda b: word_losses(m)),
        "closure": lambda m: (lambda: token_mean(m),),
    }[kind]
    model, plain = model_of(), model_of()
    loss = MeZO(model, LR, EPS, SEED).step(*arguments(model))

    def wanted(m, _):
        return word_losses(m) if kind in ("words", "plain") else token_mean(m)[None]

    with torch.no_grad():
        assert abs(loss - plain_step(plain, wanted, 0)) < 1e-6
    tolerance = 1e-3 if kind == "closure" else 1e-6  # a closure's loss is read in fp32
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_loss_that_is_not_finite_restores_the_weights_to_rounding(bad):
    model = model_of(dtype=torch.float32)
    before = snapshot(model)
    optimizer = MeZO(model, LR, EPS, SEED)
    values = [1.0, 1.0]
    values[bad] = float("nan")
    losses = iter(values)
    assert not torch.isfinite(optimizer.step(lambda: next(losses)))
    assert optimizer.skipped == 1 and optimizer.steps == 1
    assert not same_bits(model, before)  # rounding: this loop restores by subtraction
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name], rtol=3e-7, atol=1e-9)
    # the next step draws anew
    values = iter([2.0, 1.0])
    optimizer.step(lambda: next(values))
    z = noise(SEED, 1, stream_id(PURPOSE_DENSE, 0), model.get_input_embeddings().weight.shape)
    moved = model.get_input_embeddings().weight.detach() - before["model.embed_tokens.weight"]
    assert float(F.cosine_similarity(moved.flatten(), -z.flatten(), 0)) > 0.999


@pytest.mark.parametrize("fails_at", [0, 1])
def test_an_objective_that_fails_leaves_the_weights(fails_at):
    model = model_of(dtype=torch.float32).train()
    before = snapshot(model)
    calls = []

    def objective(_):
        assert not model.training
        calls.append(1)
        if len(calls) > fails_at:
            raise KeyboardInterrupt
        return torch.ones(3)

    with pytest.raises(KeyboardInterrupt):
        MeZO(model, LR, EPS, SEED).step(BATCH, objective)
    assert model.training and len(calls) == fails_at + 1
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name], rtol=3e-7, atol=1e-9)


def test_schedulers_and_seeds():
    models = [model_of() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        optimizer = MeZO(model, LR, EPS, seed)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step)
        for _ in range(2):  # the second at lr 0
            optimizer.step(BATCH, label_words(WORDS))
            scheduler.step()
    one_step = model_of()
    MeZO(one_step, LR, EPS, 0).step(BATCH, label_words(WORDS))
    first, again, other = (m.lm_head.weight for m in models)
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-4)
    assert torch.allclose(first, one_step.lm_head.weight, rtol=0, atol=1e-9)


def test_the_mean_keeps_its_graph():
    model = model_of()
    mean_loss(model, BATCH, label_words(WORDS)).backward()
    assert model.lm_head.weight.grad[WORDS].abs().min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=-1.0), "lr: expected a finite number of at least 0, got -1.0"),
        (dict(lr=float("nan")), "lr: expected a finite number"),
        (dict(eps=0.0), "eps: expected a finite number above 0, got 0.0"),
        (dict(eps=float("inf")), "eps: expected a finite number above 0, got inf"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        MeZO(model_of(), **change)
    with pytest.raises(ValueError, match="at least one parameter with requires_grad=True"):
        MeZO(model_of().requires_grad_(False))
