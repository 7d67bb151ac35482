"""One step against the equations, with every weight materialised by an independent oracle."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import BUILDERS, batch, build, closure, per_example, same_bits, snapshot
from torch import Tensor, nn

from subzero import SubZero
from subzero_kernels import (
    PURPOSE_BASIS_U,
    PURPOSE_BASIS_V,
    PURPOSE_CORE,
    PURPOSE_DENSE,
    factor_shape,
    make_rng,
    normal_,
    orthonormal_basis,
    stream_id,
)

EPS, LR, RANK, SEED = 1e-2, 1e-3, 4, 7


def direction(index: int, p: Tensor, draw: int, rank: int = RANK, window: int = 0) -> Tensor:
    """mu U Z V^T, or plain noise for a vector, from the contract: the oracle's perturbation."""
    if sum(s > 1 for s in p.shape) <= 1:
        z = torch.empty(p.numel())
        normal_(z, make_rng(SEED, draw), stream_id(PURPOSE_DENSE, index))
        return z.double().view(p.shape)
    m, n = factor_shape(p.shape, "none")
    r = min(rank, m, n)
    z = torch.empty(r, r)
    normal_(z, make_rng(SEED, draw), stream_id(PURPOSE_CORE, index))
    kind = dict(seed=SEED, window=window, dtype=torch.float32)
    u = orthonormal_basis(m, r, stream=stream_id(PURPOSE_BASIS_U, index), **kind).double()
    v = orthonormal_basis(n, r, stream=stream_id(PURPOSE_BASIS_V, index), **kind).double()
    return (math.sqrt(m * n) / r * u @ z.double() @ v.T).view(p.shape)


def moved(model: nn.Module, coefficient: float, draw: int) -> nn.Module:
    """A float64 copy whose weights are W + coefficient * direction."""
    oracle = copy.deepcopy(model).double()
    with torch.no_grad():
        for index, (_, p) in enumerate(oracle.named_parameters()):
            if p.requires_grad:
                p.add_(coefficient * direction(index, p, draw))
    return oracle


def oracle_losses(model: nn.Module, b: dict[str, Tensor], draw: int) -> tuple[float, float]:
    with torch.no_grad():
        plus, minus = (per_example(moved(model, s * EPS, draw))(b).mean().item() for s in (1, -1))
    return plus, minus


@pytest.mark.parametrize("mode", ["closure", "batch", "in_place"])
@pytest.mark.parametrize("name", BUILDERS)
def test_one_step_moves_every_parameter_along_its_direction(name: str, mode: str) -> None:
    model, b = build(name), batch()
    before = snapshot(model)
    plus, minus = oracle_losses(model, b, draw=0)
    apply = "in_place" if mode == "in_place" else "forward"
    opt = SubZero(model, lr=LR, eps=EPS, rank=RANK, seed=SEED, apply=apply)
    if mode == "batch":
        loss = opt.step(b, per_example(model))
    else:
        loss = opt.step(closure(model, b))
    assert loss.item() == pytest.approx((plus + minus) / 2, rel=1e-5)
    opt.fold()
    rho = (plus - minus) / (2 * EPS)
    for index, (key, p) in enumerate(model.named_parameters()):
        expected = -LR * rho * direction(index, p, draw=0)
        change = p.detach().double() - before[key].double()
        # rho carries the fp32 rounding of the losses, the change that of the store
        tolerance = 2e-3 * expected.norm() + 1e-7 * before[key].norm()
        assert (change - expected).norm() <= tolerance, key


@pytest.mark.parametrize("apply", ["forward", "in_place"])
def test_change_has_rank_r_and_the_singular_values_of_z(apply: str) -> None:
    model, b = build("llama"), batch()
    before = snapshot(model)
    opt = SubZero(model, lr=1.0, eps=EPS, rank=RANK, seed=SEED, apply=apply)
    opt.step(closure(model, b))
    opt.fold()
    rhos = []
    for index, (key, p) in enumerate(model.named_parameters()):
        if p.dim() != 2:
            continue
        change = (p.detach() - before[key]).double()
        values = torch.linalg.svdvals(change)
        z = torch.empty(RANK, RANK)
        normal_(z, make_rng(SEED, 0), stream_id(PURPOSE_CORE, index))
        mu = math.sqrt(p.numel()) / RANK
        expected = mu * torch.linalg.svdvals(z.double())
        assert values[RANK:].max() < 1e-5 * values[0]
        ratio = values[:RANK] / expected
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)
        rhos.append(ratio[0].item())
    assert max(rhos) == pytest.approx(min(rhos), rel=1e-3)


@pytest.mark.parametrize("sides, queries", [("two", 3), ("one", 4)])
def test_batched_groups_equal_groups_one_by_one(sides: str, queries: int) -> None:
    options = dict(lr=LR, eps=EPS, rank=RANK, seed=SEED, sides=sides, queries=queries)
    cores = []
    for together in (True, False):
        model, b = build("gpt2"), batch()
        opt = SubZero(model, **options)
        opt.plan().one_by_one = "" if together else "asked by the test"
        for _ in range(2):
            opt.step(b, per_example(model))
        cores.append(torch.cat([s.value for _, s in opt._weights.spaces()]))
        assert opt.plan().one_by_one == ("" if together else "asked by the test")
    start = build("gpt2")
    dense = torch.cat([p.detach().reshape(-1) for p in start.parameters() if p.dim() == 1])
    cores[0][-dense.numel() :] -= dense
    cores[1][-dense.numel() :] -= dense
    assert (cores[0] - cores[1]).norm() < 2e-3 * cores[1].norm()


def test_groups_are_ordered_plus_minus_and_baseline_first() -> None:
    model, b = build("llama"), batch()
    seen: list[Tensor] = []

    def spy(part: dict[str, Tensor]) -> Tensor:
        losses = per_example(model)(part)
        seen.append(losses.view(-1, 3).mean(1))
        return losses

    with torch.no_grad():
        base = per_example(model)(b).mean().item()
    two = SubZero(model, lr=0.0, eps=EPS, rank=RANK, seed=SEED, queries=2)
    two.step(b, spy)
    two.detach()
    one = SubZero(model, lr=0.0, eps=EPS, rank=RANK, seed=SEED, queries=2, sides="one")
    assert one.step(b, spy).item() == pytest.approx(base, rel=1e-6)
    one.detach()
    expected = [loss for draw in (0, 1) for loss in oracle_losses(model, b, draw)]
    assert seen[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert seen[1].tolist() == pytest.approx([base, expected[0], expected[2]], rel=1e-5)


def test_draws_advance_by_queries_and_windows_draw_new_bases() -> None:
    model, b = build("llama"), batch()
    opt = SubZero(model, lr=LR, eps=EPS, rank=RANK, seed=SEED, queries=2, refresh_every=2)
    for _ in range(2):
        opt.step(b, per_example(model))
    opt.fold()
    before = snapshot(model)
    opt.step(b, per_example(model))  # opens window 1, draws 4 and 5
    opt.fold()
    for index, (key, p) in enumerate(model.named_parameters()):
        if p.dim() == 2:
            change = (p.detach() - before[key]).double()
            basis = orthonormal_basis(
                p.shape[0], RANK, seed=SEED, window=1, stream=stream_id(PURPOSE_BASIS_U, index)
            ).double()
            outside = change - basis @ (basis.T @ change)
            assert outside.norm() < 1e-3 * change.norm()
            z = torch.stack([direction(index, p, draw, window=1).flatten() for draw in (4, 5)], 1)
            target = change.flatten()[:, None]
            residual = target - z @ torch.linalg.lstsq(z, target).solution
            assert residual.norm() < 1e-3 * change.norm()


def test_weights_keep_their_bits_within_a_window() -> None:
    model, b = build("llama"), batch()
    before = snapshot(model)
    opt = SubZero(model, lr=LR, eps=EPS, rank=RANK)

    def inside(*_: object) -> None:
        assert same_bits(model, before)

    def look() -> Tensor:
        handle = model.model.layers[1].mlp.up_proj.register_forward_hook(inside)
        loss = closure(model, b)()
        handle.remove()
        inside()
        return loss

    for _ in range(3):
        opt.step(look)
        opt.step(b, per_example(model))
    assert same_bits(model, before)
    storages = {n: p.data_ptr() for n, p in model.named_parameters()}
    with torch.no_grad():
        tuned = per_example(model)(b)
    opt.fold()
    assert not same_bits(model, before)
    assert storages == {n: p.data_ptr() for n, p in model.named_parameters()}
    opt.detach()
    with torch.no_grad():
        torch.testing.assert_close(per_example(model)(b), tuned)


def test_bf16_learns_with_read_only_weights() -> None:
    model, b = build("llama", dtype=torch.bfloat16), batch(examples=8)
    before = snapshot(model)
    with torch.no_grad():
        first = per_example(model)(b).mean().item()
    opt = SubZero(
        model, lr=1e-2, eps=1e-2, rank=8, rule="norm", queries=4, sides="one", refresh_every=1000
    )
    for _ in range(60):
        opt.step(b, per_example(model))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        last = per_example(model)(b).mean().item()
        opt.fold()
        folded = per_example(model)(b).mean().item()
    assert last < first - 0.1
    assert folded == pytest.approx(last, abs=0.02)
