"""Weight noise: rule "muon" against a loop of its own, and losses that read logits or tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_optimizer_exact import EPS, LR, RANK, SEED, direction, moved
from test_optimizer_rules import M, N, Oracle, Toy
from tiny_models import batch, build, snapshot
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero, label_words, next_token
from subzero.rules import orthogonalised

WORDS = [5, 11, 17]


class MuonOracle(Oracle):
    """norm's coefficients; M = beta M + (1 - beta) g, five Newton-Schulz steps, 0.2 sqrt(max)."""

    def update(self, space: str, h: Tensor, mu: float) -> Tensor:
        beta = self.hyper["momentum"]
        m = self.state[space, "m"] = beta * self.state.get((space, "m"), 0) + (1 - beta) * mu * h
        if space == "dense":
            return 0.2 * m / m.square().mean().sqrt()
        x = m / (m.norm() + 1e-12)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return 0.2 * math.sqrt(max(M, N)) * x


@pytest.mark.parametrize("apply", ["forward", "in_place"])
@pytest.mark.parametrize("sides, queries", [("two", 4), ("one", 5)])
def test_muon_against_oracle(sides: str, queries: int, apply: str) -> None:
    """Matrix and vector over a refresh, with weight decay and a schedule."""
    toy = Toy().double()
    hyper = dict(momentum=0.7, weight_decay=0.3)
    oracle = MuonOracle(toy, "norm", sides, queries, window=4, **hyper)
    oracle.w, oracle.b = oracle.w.clone(), oracle.b.clone()  # not the float64 model's own
    start = toy.linear.weight.detach().clone()
    opt = SubZero(
        toy, lr=0.06, eps=1e-2, rank=3, refresh_every=4, queries=queries, sides=sides,
        rule="muon", apply=apply, seed=3, **hyper,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))

    def objective(x: Tensor) -> Tensor:
        count = x.shape[0] // 5
        return (torch.tanh(toy(x)) - toy.target.repeat(count, 1)).square().mean(1)

    for step in range(6):
        oracle.step(step, 0.06 / (1 + step))
        opt.step(toy.x, objective)
        scheduler.step()
    opt.fold()
    oracle.fold(5)
    change = (oracle.w - start).norm()
    assert change > 1e-2
    # losses of weight noise are fp32, and a matrix's small singular values grow 485 times
    assert (toy.linear.weight - oracle.w).norm() < 1e-3 * change
    bias = (oracle.b - Toy().linear.bias).norm()
    assert bias > 1e-2 and (toy.linear.bias - oracle.b).norm() < 1e-4 * bias


def test_muon_sets_the_length_of_a_step() -> None:
    """Singular values of U S V^T: 0.2 lr sqrt(max(m, n)) times 0.68 to 1.21, whatever the loss."""
    for scale in (1.0, 1e3):
        toy = Toy()
        start = toy.linear.weight.detach().clone()
        opt = SubZero(toy, lr=0.1, eps=1e-2, rank=3, queries=4, rule="muon", momentum=0.0)
        opt.step(lambda toy=toy, scale=scale: scale * toy(toy.x).square().mean())
        opt.fold()
        values = torch.linalg.svdvals(toy.linear.weight.detach() - start)
        unit = values[:3] / (0.2 * 0.1 * math.sqrt(max(M, N)))
        assert 0.6 < unit.min() and unit.max() < 1.25 and values[3] < 1e-4


@pytest.mark.parametrize("queries, works", [(3, False), (4, True)])
def test_muon_needs_four_queries(queries: int, works: bool) -> None:
    if works:
        SubZero(Toy(), rank=3, queries=queries, rule="muon")
        return
    with pytest.raises(ValueError, match="queries: .*at least 4 with rule='muon'.*got 3"):
        SubZero(Toy(), rank=3, queries=queries, rule="muon")


# objectives


def mask_of(b: dict[str, Tensor]) -> Tensor:
    """Two tokens of the first example, three of the others; all real."""
    mask = torch.zeros_like(b["input_ids"], dtype=torch.bool)
    mask[:, [3, 5]] = True
    mask[1:, 2] = True
    return mask


def successors(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    """(examples, tokens): cross entropy of the next token, garbage at the end."""
    logits = model(b["input_ids"], attention_mask=b["attention_mask"]).logits
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), b["input_ids"][:, 1:], reduction="none"
    )
    return F.pad(losses, (0, 1), value=1e6)


def labels(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    logits = model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, -1, WORDS]
    return F.cross_entropy(logits, b["labels"], reduction="none")


def squares(logits: Tensor, b: Any) -> Tensor:
    return logits.float().square().mean(-1)


# (objective of the model, positions, the summed losses of a batch and their count, in the oracle)
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "label words": (
        lambda m: label_words(WORDS), lambda b: None,
        lambda m, b: (labels(m, b).sum(), len(b["labels"])),
    ),
    "next token": (
        lambda m: next_token(), lambda b: None,
        lambda m, b: real_successors(successors(m, b), b),
    ),
    "next token and positions": (
        lambda m: next_token(), mask_of,
        lambda m, b: masked(successors(m, b), b),
    ),
    "logits and positions": (
        lambda m: LogitsLoss(squares), mask_of,
        lambda m, b: masked(
            m(b["input_ids"], attention_mask=b["attention_mask"]).logits.square().mean(-1), b
        ),
    ),
    "tokens and positions": (
        lambda m: lambda b: successors(m, b), mask_of,
        lambda m, b: masked(successors(m, b), b),
    ),
}  # fmt: skip


def masked(losses: Tensor, b: dict[str, Tensor]) -> tuple[Tensor, int]:
    return losses[mask_of(b)].sum(), int(mask_of(b).sum())


def real_successors(losses: Tensor, b: dict[str, Tensor]) -> tuple[Tensor, int]:
    real = b["attention_mask"].bool()
    mask = F.pad(real[:, 1:] & real[:, :-1], (0, 1))
    return losses[mask].sum(), int(mask.sum())


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_logits_and_tokens(kind: str, micros: int) -> None:
    """Averaged over examples, or over the scored tokens of all micro-batches; no padding."""
    objective, positions, oracle = KINDS[kind]
    model = build("llama")
    before = snapshot(model)
    batches = [
        {**batch(examples=3 + i, seed=i + 1), "labels": torch.arange(3 + i) % 3}
        for i in range(micros)
    ]
    losses = []
    for sign in (1, -1):
        other = moved(model, sign * EPS, draw=0)
        with torch.no_grad():
            parts = [oracle(other, b) for b in batches]
        losses.append(sum(float(p[0]) for p in parts) / sum(p[1] for p in parts))
    opt = SubZero(model, lr=LR, eps=EPS, rank=RANK, seed=SEED)
    masks = [positions(b) for b in batches]
    if kind == "next token":
        batches = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    returned = opt.step(
        batches if micros > 1 else batches[0],
        objective(model),
        None if masks[0] is None else masks if micros > 1 else masks[0],
    )
    assert returned.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    opt.fold()
    rho = (losses[0] - losses[1]) / (2 * EPS)
    for index, (name, p) in enumerate(model.named_parameters()):
        expected = -LR * rho * direction(index, p, draw=0)
        change = p.detach().double() - before[name].double()
        tolerance = 5e-3 * expected.norm() + 1e-7 * before[name].norm()
        assert (change - expected).norm() <= tolerance, name


def test_token_losses_of_an_encoder_decoder() -> None:
    """The token axis is the decoder's, whose input the model makes of the labels."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(2, 96, (3, 7), generator=generator)
    labels = torch.randint(2, 96, (3, 5), generator=generator)
    labels[1, 3:] = -100
    b = {"input_ids": source, "labels": labels}
    changed = []
    for by_token in (True, False):
        model = build("t5")

        def losses(part: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            logits = model(**part).logits.transpose(1, 2)
            return F.cross_entropy(logits, part["labels"].clamp(min=0), reduction="none")

        opt = SubZero(model, lr=LR, eps=EPS, rank=RANK)
        if by_token:
            loss = opt.step(b, losses)
        else:
            loss = opt.step(lambda losses=losses: losses(b)[labels != -100].mean())
        opt.fold()
        changed.append(torch.cat([loss[None], *(p.detach().flatten() for p in model.parameters())]))
    torch.testing.assert_close(changed[0], changed[1], rtol=1e-4, atol=1e-5)


def test_a_token_loss_outside_the_positions_is_not_read() -> None:
    """Not even one that is not finite."""
    model, b = build("llama"), batch()

    def loss(part: dict[str, Tensor]) -> Tensor:
        return successors(model, part).masked_fill(~mask_of(part), math.inf)

    opt = SubZero(model, lr=LR, eps=EPS, rank=RANK)
    assert opt.step(b, loss, mask_of(b)).isfinite() and opt.skipped == 0
    with pytest.raises(ValueError, match=r"positions: .*\(3, 7\)"):
        opt.step(b, loss, mask_of(b)[:, :4])


@pytest.mark.parametrize("shape", [(3, 16, 400), (3, 400, 16), (2, 16, 40), (2, 24, 24)])
def test_newton_schulz_in_fp32_equals_that_in_float64(shape: tuple[int, int, int]) -> None:
    """Long matrices take another way; singular values from 1 to 1e-4, and a matrix of zeros."""
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    m = 7.0 * (u * torch.logspace(0, -4, u.shape[-1], dtype=torch.float64)) @ v
    m[-1] = 0
    expected = []
    for x in m:
        x = x / (x.norm() + 1e-12)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        expected.append(x)
    found = orthogonalised(m.float()).double()
    for x, wanted in zip(found[:-1], expected[:-1], strict=True):
        assert (x - wanted).norm() <= 1e-3 * wanted.norm()
    assert not found[-1].any()
