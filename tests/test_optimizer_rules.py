"""Rules, weight decay, schedulers, windows: against a small float64 loop that the test holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subzero import SubZero
from subzero_kernels import (
    PURPOSE_BASIS_U,
    PURPOSE_BASIS_V,
    PURPOSE_CORE,
    PURPOSE_DENSE,
    make_rng,
    normal_,
    orthonormal_basis,
    stream_id,
)

SEED, RANK, EPS = 3, 3, 1e-2
M, N = 10, 7


class Toy(nn.Module):
    """One matrix and one bias under a smooth loss, so that a float64 oracle is short."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(N, M)
        self.register_buffer("x", torch.randn(5, N))
        self.register_buffer("target", torch.randn(5, M))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def losses(w: Tensor, b: Tensor, toy: Toy) -> Tensor:
    y = toy.x.double() @ w.T + b
    return (torch.tanh(y) - toy.target.double()).square().mean(1)


def normal(shape: tuple[int, ...], draw: int, stream: int) -> Tensor:
    z = torch.empty(shape)
    normal_(z, make_rng(SEED, draw), stream)
    return z.double()


class Oracle:
    """DESIGN's step, written out in float64."""

    def __init__(self, toy: Toy, rule: str, sides: str, queries: int, window: int, **hyper: float):
        self.toy, self.rule, self.sides, self.queries, self.window = (
            toy,
            rule,
            sides,
            queries,
            window,
        )
        self.hyper = hyper
        self.w = toy.linear.weight.detach().double()
        self.b = toy.linear.bias.detach().double()
        self.s = torch.zeros(RANK, RANK, dtype=torch.float64)
        self.decay, self.count = 1.0, 0
        self.state: dict[str, Any] = {}
        self.mu = math.sqrt(M * N) / RANK

    def bases(self, step: int) -> tuple[Tensor, Tensor]:
        kind: dict[str, Any] = dict(seed=SEED, window=step // self.window)
        return (
            orthonormal_basis(M, RANK, stream=stream_id(PURPOSE_BASIS_U, 0), **kind).double(),
            orthonormal_basis(N, RANK, stream=stream_id(PURPOSE_BASIS_V, 0), **kind).double(),
        )

    def fold(self, step: int) -> None:
        u, v = self.bases(step)
        self.w = self.decay * self.w + u @ self.s @ v.T
        self.s.zero_()
        self.decay = 1.0

    def step(self, step: int, lr: float) -> None:
        if step and step % self.window == 0:
            self.fold(step - 1)
            for key in [k for k in self.state if k[0] == "core"]:
                del self.state[key]
            self.count_core = 0
        u, v = self.bases(step)
        k_range = range(self.queries)
        zs = [
            normal((RANK, RANK), step * self.queries + k, stream_id(PURPOSE_CORE, 0))
            for k in k_range
        ]
        ds = [normal((M,), step * self.queries + k, stream_id(PURPOSE_DENSE, 1)) for k in k_range]

        def at(k: int, sign: float) -> Tensor:
            core = self.s + sign * EPS * self.mu * zs[k]
            return losses(self.w + u @ core @ v.T, self.b + sign * EPS * ds[k], self.toy).mean()

        plus = torch.stack([at(k, 1) for k in k_range])
        if self.sides == "two":
            minus = torch.stack([at(k, -1) for k in k_range])
            difference, spread = plus - minus, torch.cat([plus, minus])
            rho = difference / (2 * EPS)
        else:
            difference, spread = plus - at(0, 0), plus
            rho = difference / EPS
        if self.rule == "norm":
            rho = difference / spread.std()
        decay = 1 - lr * self.hyper.get("weight_decay", 0.0)
        self.s *= decay
        self.decay *= decay
        h_core = sum(r * z for r, z in zip(rho, zs, strict=True)) / self.queries
        h_dense = sum(r * d for r, d in zip(rho, ds, strict=True)) / self.queries
        self.s -= lr * self.update("core", h_core, self.mu)
        self.b = self.b - lr * self.update("dense", h_dense, 1.0)

    def update(self, space: str, h: Tensor, mu: float) -> Tensor:
        if self.rule in ("sgd", "norm"):
            return mu * h
        if self.rule == "momentum":
            buffer = self.hyper["momentum"] * self.state.get((space, "m"), 0) + mu * h
            self.state[space, "m"] = buffer
            return buffer
        b1, b2 = 0.8, 0.9
        t = self.state.get((space, "t"), 0) + 1
        m = b1 * self.state.get((space, "m"), 0) + (1 - b1) * h
        s = b2 * self.state.get((space, "v"), 0) + (1 - b2) * h * h
        self.state[space, "t"], self.state[space, "m"], self.state[space, "v"] = t, m, s
        return mu * (m / (1 - b1**t)) / ((s / (1 - b2**t)).sqrt() + 1e-6)


@pytest.mark.parametrize("apply", ["forward", "in_place"])
@pytest.mark.parametrize(
    "rule, sides, queries, lr",
    [
        ("sgd", "two", 1, 0.01),
        ("sgd", "one", 3, 0.01),
        ("momentum", "two", 2, 0.003),
        ("adam", "two", 2, 0.003),
        ("norm", "one", 5, 0.01),
        ("norm", "two", 4, 0.01),
    ],
)
def test_rule_against_oracle(rule: str, sides: str, queries: int, lr: float, apply: str) -> None:
    toy = Toy()
    hyper = dict(momentum=0.7, weight_decay=0.5)
    oracle = Oracle(toy, rule, sides, queries, window=4, **hyper)
    start = toy.linear.weight.detach().clone()
    opt = SubZero(
        toy, lr=lr, eps=EPS, rank=RANK, refresh_every=4, queries=queries, sides=sides, rule=rule,
        apply=apply, seed=SEED, betas=(0.8, 0.9), adam_eps=1e-6, **hyper,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))

    def objective(x: Tensor) -> Tensor:
        count = x.shape[0] // 5
        return (torch.tanh(toy(x)) - toy.target.repeat(count, 1)).square().mean(1)

    for step in range(6):
        oracle.step(step, lr / (1 + step))
        opt.step(toy.x, objective)
        scheduler.step()
    opt.fold()
    oracle.fold(5)
    moved = (oracle.w - start).norm()
    assert moved > 1e-3
    assert (toy.linear.weight.double() - oracle.w).norm() < 2e-3 * moved
    assert (toy.linear.bias.double() - oracle.b).norm() < 2e-3 * (
        oracle.b - Toy().linear.bias
    ).norm()


def test_a_small_decay_is_not_lost() -> None:
    """1 - lr weight_decay is 1 in fp32; W's own product holds it."""
    toy = Toy()
    opt = SubZero(toy, lr=1e-6, rank=RANK, weight_decay=1e-2)
    for _ in range(3):
        opt.step(lambda: (toy(toy.x) - toy.target).square().mean())
    assert opt._weights.decay.item() == pytest.approx((1 - 1e-8) ** 3, abs=1e-15)


@pytest.mark.parametrize("keep", [True, False])
def test_state_at_refresh(keep: bool) -> None:
    toy = Toy()
    opt = SubZero(
        toy, lr=0.0, rank=RANK, rule="momentum", refresh_every=2, momentum=0.5,
        state_at_refresh="keep" if keep else "reset",
    )  # fmt: skip
    loss = lambda: (toy(toy.x) - toy.target).square().mean()  # noqa: E731
    opt.step(loss)
    opt.step(loss)
    before = opt._rule_state["core"]["momentum"].clone()
    z = torch.zeros_like(before)
    opt.step(loss)
    after = opt._rule_state["core"]["momentum"]
    space = dict(opt._weights.spaces())["core"]
    space.add_noise_(z, torch.ones(1), make_rng(0, 2))
    rest = after - 0.5 * before if keep else after
    rho = (rest @ z) / (z @ z)
    assert torch.allclose(rest, rho * z, atol=1e-4 * rest.abs().max().item())


def test_micro_batches_average_over_examples() -> None:
    results = []
    for parts in ([5], [2, 3], [1, 1, 3]):
        toy = Toy()
        opt = SubZero(toy, lr=0.05, eps=EPS, rank=RANK, seed=SEED, queries=2)

        def objective(b: dict[str, Tensor], toy: Toy = toy) -> Tensor:
            return (torch.tanh(toy(b["x"])) - b["y"]).square().mean(1)

        batches = [
            {"x": x, "y": y}
            for x, y in zip(toy.x.split(parts), toy.target.split(parts), strict=True)
        ]
        loss = opt.step(batches if len(parts) > 1 else batches[0], objective)
        opt.fold()
        results.append(torch.cat([loss[None], toy.linear.weight.detach().flatten()]))
    start = Toy().linear.weight.detach().flatten()
    assert (results[0][1:] - start).norm() > 1e-3
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_skips_the_step(rule: str, bad: float) -> None:
    toy = Toy()
    opt = SubZero(toy, lr=0.01, rank=RANK, rule=rule, queries=4, sides="one", weight_decay=0.1)
    good = lambda: (toy(toy.x) - toy.target).square().mean()  # noqa: E731
    opt.step(good)
    frozen = [t.clone() for t in _everything(opt)]
    calls = iter([1.0, 1.0, bad, 1.0, 1.0])
    returned = opt.step(lambda: good() * next(calls))
    assert math.isfinite(returned.item())  # the baseline
    assert opt.skipped == 1 and opt.steps == 2 and opt.draws == 8
    for a, b in zip(frozen, _everything(opt), strict=True):
        assert torch.equal(a, b)
    opt.step(good)
    assert opt.skipped == 1
    assert any(not torch.equal(a, b) for a, b in zip(frozen, _everything(opt), strict=True))


def _everything(opt: SubZero) -> list[Tensor]:
    found = [space.value for _, space in opt._weights.spaces()]
    found += [opt._weights.decay]
    found += [v for group in opt._rule_state.values() for v in group.values()]
    return found + [p.detach() for p in opt.model.parameters()]
