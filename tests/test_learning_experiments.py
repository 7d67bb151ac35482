"""The study's experiments do to the estimator what they say, on a tiny model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_task import llama, sentences, tokenizer

from subzero.batches import Encoder, TrainBatches
from subzero.forms import CreditSpace
from subzero.objectives import label_words
from subzero.tasks import Example
from subzero_kernels import add_noise_

FOLDER = Path(__file__).parents[1] / "benchmarks" / "learning"
LOCAL = ("methods", "experiments")  # modules that import each other by name
WORDS = [5, 9]


@pytest.fixture(scope="module")
def methods() -> Iterator[ModuleType]:
    """The script as a module; benchmarks/ is no package."""
    before = {name: sys.modules.pop(name) for name in LOCAL if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("methods")
    sys.path.remove(str(FOLDER))
    for name in LOCAL:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def experiments(methods) -> ModuleType:
    return sys.modules["experiments"]


def start(methods, form="core", **choice):
    """A stepper on a tiny model, and batches."""
    tok = tokenizer()
    torch.manual_seed(0)
    model = llama(len(tok), num_hidden_layers=4)
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    batches = iter(TrainBatches(Encoder(tok, model), examples, 8, 0))
    options = dict(
        noise="activation", form=form, credit="block", rule="muon", queries=8, layers=1.0,
        modules="residual", lr=1e-2, rank=4, batch=8,
    )  # fmt: skip
    if form == "full":
        options["rank"] = 1
    stepper = methods.Stepper(
        methods.Method("subzero", options), choice, model, label_words(WORDS), seed=0
    )
    stepper.set_lr(1.0)
    return stepper, batches


def asked_in_a_step(stepper, batch, look):
    """Make one step; ``look(space, coeff, rng)`` runs where the rule asks for its gradient."""
    space = stepper.optimizer._weights.space
    given, seen = space.add_noise_, []

    def add_noise_(flat, coeff, rng):
        seen.append(look(space, coeff, rng))
        given(flat, coeff, rng)

    space.add_noise_ = add_noise_
    stepper.step(batch)
    space.add_noise_ = given
    (one,) = seen
    return one


def estimate(space, add_noise_, coeff, rng):
    """The gradient's estimate as one flat tensor."""
    flat = space.zeros()
    add_noise_(flat, coeff, rng)
    return flat


def plainly(space, coeff, rng):
    return estimate(space, lambda *given: CreditSpace.add_noise_(space, *given), coeff, rng)


def test_noise_on_every_second_block_credits_the_one_below(methods):
    stepper, batches = start(methods, every=2)
    stepper.align(batches)
    taps = stepper.optimizer._weights.taps
    noisy = [tap.credit.name for tap in taps if tap.credit.noisy]
    assert [name.split(".")[2] for name in noisy] == ["1", "3"]
    names = {tap.credit.index: tap.credit.name for tap in taps}
    for tap in taps:
        block, source = (int(n.split(".")[2]) for n in (tap.credit.name, names[tap.credit.source]))
        assert source == block + (block % 2 == 0)
    before = [p.clone() for p in stepper.trained]
    stepper.step(next(batches))
    assert all(not torch.equal(p, q) for p, q in zip(stepper.weights(), before, strict=True))


def test_pooling_with_nobody_is_the_plain_estimate(methods, experiments):
    stepper, batches = start(methods, "right", pool=1)
    stepper.align(batches)

    def look(space, coeff, rng):
        pooled = estimate(space, space.__dict__["pooled"], coeff, rng)
        experiments.pool_neighbours(space, 0)
        alone = estimate(space, space.add_noise_, coeff, rng)
        return pooled, alone, plainly(space, coeff, rng)

    space = stepper.optimizer._weights.space
    space.pooled = space.add_noise_
    pooled, alone, plain = asked_in_a_step(stepper, next(batches), look)
    torch.testing.assert_close(alone, plain)
    assert not torch.allclose(pooled, plain)


def test_heads_gradient_is_autograds(methods):
    stepper, batches = start(methods, control=True)
    stepper.align(batches)
    batch = next(batches)
    got = asked_in_a_step(stepper, batch, lambda *_: stepper.control.gradient())
    model = start(methods)[0].model  # as it was before the step
    kept = []
    norm = model.model.norm
    norm.register_forward_pre_hook(lambda _, args: kept.append(args[0].requires_grad_()))
    for p in model.parameters():
        p.requires_grad_(False)
    loss = stepper.objective(model, batch).sum()
    (wanted,) = torch.autograd.grad(loss, kept[-1])
    torch.testing.assert_close(got, wanted[:, -1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["core", "full"])
def test_control_keeps_the_mean_and_takes_out_what_the_head_explains(methods, form):
    """Coefficients z . g give sum_i K g_i a_i without noise; others keep their rest as it was."""
    stepper, batches = start(methods, form, control=True)
    stepper.align(batches)

    def look(space, coeff, rng):
        control, queries = stepper.control, len(coeff)
        tap = next(tap for tap in space.taps if tap.credit.noisy)
        head = control.gradient() * tap._norm[:, None]
        if tap.carrier is not None:
            head = head @ tap.carrier
        _, kept, ids = space.rows_of(tap, coeff)
        noise = head.new_zeros(queries, len(ids), head.shape[1])
        every = torch.arange(queries)
        add_noise_(noise, noise.new_ones(noise.shape[:2]), every, ids, rng, stream=tap.stream)
        explained = (noise * head).sum(2)
        at = space.taps.index(tap)
        spread = (tap.credit.m / tap.credit.rank) ** 0.5 if form == "core" else 1.0
        got = space.views(estimate(space, control.add_noise_, explained, rng))
        return got[at], spread * queries * head.T @ kept, got[-1]

    got, wanted, other = asked_in_a_step(stepper, next(batches), look)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert other.abs().max() < 1e-3 * got.abs().max()


def test_a_schedule_ends_where_it_should(methods):
    stepper, batches = start(methods, queries=4, queries_end=16, batch=4, batch_end=16)
    assert stepper.begin_part(0.0) is False
    assert (stepper.batch, stepper.optimizer.options.queries) == (4, 4)
    assert stepper.begin_part(0.5) is True
    assert (stepper.batch, stepper.optimizer.options.queries) == (8, 8)
    stepper.begin_part(1.0)
    assert (stepper.batch, stepper.optimizer.options.queries) == (16, 16)
    stepper.align(batches)
    stepper.step(next(batches))
    assert stepper.optimizer.draws == 16
