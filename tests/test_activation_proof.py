"""The estimator's mean is the gradient, within the standard error of the simulation.

With s = eps (rule sgd) the mean of the estimate over draws is G (form full), G V (right) and
(m / r) U^T G V (core), G being autograd's gradient of the mean loss through the noisy rows alone.
Estimates are what the optimizer does: one step at lr = 1 from the same weights is minus one
estimate. A statistic is the projection on a fixed direction, so that one number and its standard
error decide; the directions are the target's own and random ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZE, build
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero

DRAWS, QUERIES, RANK, EPS = 40, 12, 3, 1e-4
BLOCK = "model.layers.1."
TRAINED = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def tiny() -> nn.Module:
    """Llama with weights large enough for the paths through the blocks to matter."""
    model = build("llama", dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8.0)
    for name, p in model.named_parameters():
        p.requires_grad_(any(name == f"{BLOCK}{part}.weight" for part in TRAINED))
    return model


def data() -> tuple[dict[str, Tensor], Tensor]:
    """Three sequences, and the two or three tokens of each that the loss reads."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, SIZE["vocab_size"], (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, [3, 5]] = True
    positions[1, 4] = True
    return {"input_ids": ids, "attention_mask": mask}, positions


def token_losses(logits: Tensor, b: Any) -> Tensor:
    """Smooth, and not additive over the vocabulary: (examples, P)."""
    return F.log_softmax(logits, -1)[..., :3].sin().sum(-1)


def one_token(logits: Tensor, b: Any) -> Tensor:
    return token_losses(logits, b)[:, 0]


def gradients(model: nn.Module, b: Any, positions: Tensor, per_token: bool) -> dict[str, Tensor]:
    """Autograd's gradient of the mean loss through the scored rows of each linear alone.

    Per token each loss sees its own row only (discount 0): the rows of other tokens are constants.
    """
    total: dict[str, Tensor] = {}
    modules = {n: m for n, m in model.named_modules() if any(n == BLOCK + t for t in TRAINED)}

    def through(rows: Tensor) -> list[Any]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            return torch.where(rows[..., None], y, y.detach())

        return [m.register_forward_hook(hook) for m in modules.values()]

    def add(rows: Tensor, loss: Any) -> None:
        handles = through(rows)
        model.zero_grad()
        loss(model(**b).logits).backward()
        for handle in handles:
            handle.remove()
        for name, m in modules.items():
            total[name] = total.get(name, 0) + m.weight.grad.clone()

    if per_token:
        scored = positions & b["attention_mask"].bool()
        for row, token in scored.nonzero().tolist():
            rows = torch.zeros_like(positions)
            rows[row, token] = True
            add(rows, lambda x, i=(row, token): token_losses(x[i][None, None], b).sum()
                / scored.sum())  # fmt: skip
    else:
        last = torch.full((3, 1), 5)
        rows = torch.zeros_like(positions).scatter_(1, last, True)
        add(rows, lambda x: one_token(x[:, 5:], b).mean())
    return total


def estimates(model: nn.Module, form: str, credit: str, per_token: bool, draws: int = DRAWS) -> Any:
    """(name -> (draws, m, n) estimates of G, the optimizer): lifted to W where a basis is used."""
    b, positions = data()
    objective = LogitsLoss(token_losses if per_token else one_token)
    if not per_token:
        positions = torch.zeros_like(positions)
        positions[:, 5] = True
    opt = SubZero(
        model, lr=1.0, eps=EPS, rank=RANK, queries=QUERIES, noise="activation", form=form,
        credit=credit, seed=9,
    )  # fmt: skip
    space = opt._weights.space
    names = [e.name.removesuffix(".weight") for e in opt.plan().entries]
    start = [e.param.detach().clone() for e in opt.plan().entries]
    found: list[list[Tensor]] = [[] for _ in names]
    for _ in range(draws):
        opt.step(b, objective, positions)
        views = [e.param.detach() for e in opt.plan().entries]
        if form != "full":
            views = [v.clone() for v in space.views(space.value)]
            space.value.zero_()
            opt._weights.show()
        for i, view in enumerate(views):
            found[i].append(start[i] - view if form == "full" else -view)
        if form == "full":
            for e, w in zip(opt.plan().entries, start, strict=True):
                e.param.data.copy_(w)
    return {n: torch.stack(f) for n, f in zip(names, found, strict=True)}, opt


def target(opt: SubZero, name: str, gradient: Tensor) -> Tensor:
    tap = next(t for t in opt._weights.taps if t.credit.name == f"{name}.weight")
    if opt.options.form == "full":
        return gradient
    if opt.options.form == "right":
        return gradient @ tap.basis
    return tap.credit.m / RANK * tap.carrier.T @ gradient @ tap.basis


def deviations(samples: Tensor, wanted: Tensor, directions: int = 4) -> Tensor:
    """(mean - wanted) . d in standard errors, for the target's direction and random ones."""
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(directions, *wanted.shape, generator=generator, dtype=wanted.dtype)
    d = torch.cat([wanted[None], d]).flatten(1)
    along = samples.flatten(1) @ d.T
    error = along.std(0) / len(samples) ** 0.5
    return (along.mean(0) - wanted.flatten() @ d.T) / error


@pytest.mark.parametrize(
    "form, per_token", [("full", False), ("right", True), ("core", False), ("full", True)]
)
def test_mean_is_the_gradient(form: str, per_token: bool) -> None:
    """Own credit: every linear, within 4 standard errors; twice the gradient is refused."""
    model = tiny()
    b, positions = data()
    truth = gradients(model, b, positions, per_token)
    samples, opt = estimates(model, form, "own", per_token)
    assert sorted(samples) == sorted(truth)
    for name, some in samples.items():
        wanted = target(opt, name, truth[name])
        assert deviations(some, wanted).abs().max() < 4, name
        # the proof has the power to refuse other scales
        assert deviations(some, 2 * wanted)[0].abs() > 4, name
        assert deviations(some, 0.5 * wanted)[0].abs() > 4, name


@pytest.mark.parametrize("form", ["full", "core"])
def test_block_credit(form: str) -> None:
    """The noisy linear has its true mean; the earlier one E = mean |x_d| g x_o^T / |x_o|.

    g is the gradient at the block's output: the path through the block's own MLP is missing, and
    rows are weighed by |x_d| / |x_o|. Both are measured here, as docs/activation-noise.md says.
    """
    model = tiny()
    b, positions = data()
    true = gradients(model, b, positions, False)
    truth = true[BLOCK + "self_attn.o_proj"]
    inputs: dict[str, Tensor] = {}
    last: list[Tensor] = []
    handles = [
        model.get_submodule(BLOCK + part).register_forward_pre_hook(
            lambda m, args, part=part: inputs.__setitem__(part, args[0].detach()[:, 5])
        )
        for part in ("self_attn.o_proj", "mlp.down_proj")
    ]
    handles.append(
        model.get_submodule(BLOCK + "mlp.down_proj").register_forward_hook(
            lambda m, args, y: last.append(y) or y.retain_grad()
        )
    )
    loss = one_token(model(**b).logits[:, 5:], b).sum()
    loss.backward()
    for handle in handles:
        handle.remove()
    g = last[0].grad[:, 5]
    x_o, x_d = inputs["self_attn.o_proj"], inputs["mlp.down_proj"]
    unit = x_o / x_o.norm(dim=1, keepdim=True)
    formula = torch.einsum("b,bm,bn->mn", x_d.norm(dim=1), g, unit) / len(g)
    samples, opt = estimates(model, form, "block", False)
    for part in ("mlp.down_proj", "mlp.up_proj"):
        own = target(opt, BLOCK + part, true[BLOCK + part])
        assert deviations(samples[BLOCK + part], own).abs().max() < 4, part
        assert deviations(samples[BLOCK + part], 2 * own)[0].abs() > 4, part
    name = BLOCK + "self_attn.o_proj"
    wanted = target(opt, name, formula)
    assert deviations(samples[name], wanted).abs().max() < 4
    # it is biased, measurably, and points downhill all the same
    assert deviations(samples[name], target(opt, name, truth)).abs().max() > 4
    cosine = F.cosine_similarity(formula.flatten(), truth.flatten(), dim=0)
    assert 0.1 < cosine < 0.999


def test_variance_is_that_of_the_table() -> None:
    """One noisy linear, a loss an example: V = (m + 1) Q / (K B), the table of the docs."""
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad_(name == f"{BLOCK}mlp.down_proj.weight")
    b, _ = data()
    name = BLOCK + "mlp.down_proj"
    parts = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(
        lambda m, args, y: torch.cat([y[:, :5].detach(), y[:, 5:]], 1)
    )
    for i in range(3):
        model.zero_grad()
        one_token(model(**b).logits[:, 5:], b)[i].backward()
        parts.append(module.weight.grad.clone())
    handle.remove()
    q = torch.stack(parts).square().sum((1, 2)).mean()
    truth = torch.stack(parts).mean(0)
    samples = estimates(model, "full", "own", False, draws=100)[0][name]
    squares = (samples - truth).square().sum((1, 2))
    predicted = (truth.shape[0] + 1) * q / (QUERIES * 3)
    error = squares.std() / len(squares) ** 0.5
    assert (squares.mean() - predicted).abs() < 4 * error
    assert (squares.mean() - 1.2 * predicted).abs() > 4 * error
