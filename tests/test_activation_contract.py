"""What activation noise promises around its arithmetic: noise, weights, folds, resumes, skips."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, same_bits, snapshot
from torch import Tensor, nn

from subzero import SubZero, label_words, next_token
from subzero_kernels import make_rng
from subzero_kernels.rng import normals

WORDS = [5, 11, 17]
FORMS = ("core", "right", "full")
RULES = ("sgd", "norm", "muon", "momentum", "adam")
BASE: dict[str, Any] = dict(
    lr=1e-2, eps=1e-3, rank=3, queries=2, seed=11, noise="activation", refresh_every=3
)


def data(examples: int = 3, tokens: int = 7, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 96, (examples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    labels = torch.arange(examples) % len(WORDS)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(opt: SubZero, seed: int = 1) -> Tensor:
    return opt.step(data(seed=seed), label_words(WORDS))


def token_losses(model: nn.Module) -> Any:
    def loss(b: dict[str, Tensor]) -> Tensor:
        logits = model(**{k: v for k, v in b.items() if k != "labels"}).logits
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2), b["input_ids"][:, 1:], reduction="none"
        )
        return F.pad(losses, (0, 1))

    return loss


# the noise


def pieces() -> dict[str, tuple[dict[str, Tensor], list[tuple[int, list[int]]]]]:
    """The same two sequences, of 4 and 3 tokens, in four layouts: batch, and where each lies."""
    a, c = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11])
    zero = torch.zeros(2, dtype=torch.long)

    def rows(*parts: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat(p) for p in parts])

    one = torch.ones_like
    left = rows([zero[:1], a], [zero, c]), rows([zero[:1], one(a)], [zero, one(c)])
    right = rows([a, zero[:1]], [c, zero]), rows([one(a), zero[:1]], [one(c), zero])
    packed = torch.cat([a, c])[None]
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    behind = torch.cat([zero[:1], a, c])[None]
    return {
        "left": (
            dict(input_ids=left[0], attention_mask=left[1]),
            [(0, [1, 2, 3, 4]), (1, [2, 3, 4])],
        ),
        "right": (
            dict(input_ids=right[0], attention_mask=right[1]),
            [(0, [0, 1, 2, 3]), (1, [0, 1, 2])],
        ),
        "packed": (
            dict(input_ids=packed, position_ids=places),
            [(0, [0, 1, 2, 3]), (0, [4, 5, 6])],
        ),
        "packed behind padding": (
            dict(
                input_ids=behind, attention_mask=(behind > 0).long(),
                position_ids=torch.cat([zero[:1, None], places], 1),
            ),
            [(0, [1, 2, 3, 4]), (0, [5, 6, 7])],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_noise_is_the_contracts_however_the_batch_is_laid_out(form: str) -> None:
    """(y_k - y_0) / (eps |x|) at a linear's output is row example * 2**20 + position."""
    for where in ("loss", "all"):
        for layout, (b, places) in pieces().items():
            model = build("llama", dtype=torch.float64)
            for name, p in model.named_parameters():
                p.requires_grad_("layers.0.self_attn.q_proj" in name)
            index = [n for n, _ in model.named_parameters()].index(
                "model.layers.0.self_attn.q_proj.weight"
            )
            module = model.model.layers[0].self_attn.q_proj
            seen: list[tuple[Tensor, Tensor]] = []
            module.register_forward_hook(
                lambda m, args, y, to=seen: to.append((args[0], y.clone()))
            )
            options = {**BASE, "form": form, "where": where, "queries": 3, "credit": "own"}
            opt = SubZero(model, **options)
            mask = torch.zeros_like(b["input_ids"], dtype=torch.bool)
            for row, tokens in places:
                mask[row, tokens[1:3]] = True
            for _ in range(2):  # draws 0 to 2, then 3 to 5
                opt.step(b, token_losses(model), mask)
            x, y = (t.unflatten(0, (4, len(mask))) for t in seen[-1])
            noise = (y[1:] - y[0]) / (opt.param_groups[0]["eps"] * x[0].norm(dim=-1, keepdim=True))
            tap = opt._weights.taps[0]
            expected = torch.zeros_like(noise)
            columns = 3 if form == "core" else 32
            for example, (row, tokens) in enumerate(places):
                for position, t in enumerate(tokens):
                    if where == "loss" and not mask[row, t]:
                        continue
                    for k in range(3):
                        first = (example * 2**20 + position) * columns
                        z = normals(make_rng(11, 3 + k), 5 << 28 | index, columns, start=first)
                        z = z.double()
                        if form == "core":
                            z = math.sqrt(32 / 3) * tap.carrier @ z
                        expected[k, row, t] = z
            torch.testing.assert_close(noise, expected, rtol=0, atol=1e-9, msg=(layout, where))


def test_layouts_give_the_same_step() -> None:
    """The change of the weights does not depend on padding."""
    changes = []
    for layout in ("left", "right"):
        b, places = pieces()[layout]
        model = build("llama", dtype=torch.float64)
        opt = SubZero(model, **{**BASE, "form": "full", "rule": "norm", "lr": 1.0})
        opt.step(b, next_token())
        changes.append(torch.cat([e.param.detach().flatten() for e in opt.plan().entries]))
    start = build("llama", dtype=torch.float64).state_dict()
    start = torch.cat([start[e.name].flatten() for e in opt.plan().entries])
    assert (changes[0] - start).norm() > 0.1
    # RoPE is relative, and rounds its angles in fp32
    assert (changes[0] - changes[1]).norm() < 1e-3 * (changes[0] - start).norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token", [False, True])
def test_micro_batches_equal_one_batch(form: str, token: bool) -> None:
    """Losses, weights and the rows remembered."""
    results, b = [], data(5)
    for sizes in ([5], [1, 4], [2, 2, 1]):
        model = build("llama", dtype=torch.float64)
        opt = SubZero(model, **{**BASE, "form": form, "rule": "muon", "discount": 0.5 * token})
        parts = [dict(zip(b, t, strict=True)) for t in zip(*(v.split(sizes) for v in b.values()),
                 strict=True)]  # fmt: skip
        objective = next_token() if token else label_words(WORDS)
        if token:
            for part in parts:
                del part["labels"]
        losses = [opt.step(parts if len(parts) > 1 else parts[0], objective) for _ in range(4)]
        opt.fold()
        results.append(
            torch.cat([torch.stack(losses), *(p.detach().flatten() for p in model.parameters())])
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)


# weights and windows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["core", "right"])
def test_weights_keep_their_bits_within_a_window(form: str, family: str) -> None:
    """Also inside the forwards of a step; the model sees the change all the same."""
    model = build(family)
    before = snapshot(model)
    opt = SubZero(model, **{**BASE, "form": form, "weight_decay": 0.1, "lr": 0.1, "rule": "norm"})
    inside: list[bool] = []
    linear = next(m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    linear.register_forward_hook(lambda *_: inside.append(same_bits(model, before)))
    with torch.no_grad():
        plain = model(data()["input_ids"]).logits
        step(opt)
        opt.step(data() | {"labels": data()["input_ids"]}, token_losses(model))
        assert opt.window == 0 and same_bits(model, before)
        tuned = model(data()["input_ids"]).logits
        assert (tuned - plain).norm() > 1e-3 * plain.norm()
    assert inside and all(inside)
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    opt.param_groups[0]["weight_decay"] = 0.0
    opt.fold()
    assert not same_bits(model, before)
    assert storage == {n: p.data_ptr() for n, p in model.named_parameters()}
    credited = {e.name for e in opt.plan().entries}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in credited), name


@pytest.mark.parametrize("form", ["core", "right"])
def test_a_fold_keeps_what_the_model_computes(form: str) -> None:
    model = build("gpt2", dtype=torch.float64)
    opt = SubZero(model, **{**BASE, "form": form, "lr": 0.1, "rule": "norm"})
    step(opt)
    with torch.no_grad():
        live = model(data()["input_ids"]).logits
        opt.fold()
        torch.testing.assert_close(model(data()["input_ids"]).logits, live)
        opt.detach()
        torch.testing.assert_close(model(data()["input_ids"]).logits, live)
    assert type(model) is type(build("gpt2")) and not model._forward_hooks


def test_frozen_parts_and_shared_blocks() -> None:
    """Frozen linears neither move nor get noise; blocks in front of the noise run one group."""
    model = build("llama", dtype=torch.float64)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.up_proj.requires_grad_(False)
    before = snapshot(model)
    sizes: dict[int, list[int]] = {0: [], 1: []}
    for i in (0, 1):
        model.model.layers[i].mlp.up_proj.register_forward_hook(
            lambda m, args, y, i=i: sizes[i].append(len(y))
        )
    opt = SubZero(model, **{**BASE, "form": "full"})
    assert "run once for all groups" not in str(opt.plan())  # rows share everything anyway
    opt.step(data() | {"labels": data()["input_ids"]}, token_losses(model))
    assert sizes == {0: [3], 1: [9]}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {
        f"model.layers.1.{n}.weight"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                  "mlp.gate_proj", "mlp.down_proj")
    }  # fmt: skip


def test_a_row_of_zeros_has_no_noise_and_no_credit() -> None:
    """|x| = 0: nothing is divided by it."""
    model = build("opt", dtype=torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1.fc2.weight" in name)
    with torch.no_grad():  # relu of a negative number: fc2 sees zeros only
        model.model.decoder.layers[1].fc1.weight.zero_()
        model.model.decoder.layers[1].fc1.bias.fill_(-1.0)
    before = snapshot(model)
    for form in FORMS:
        opt = SubZero(model, **{**BASE, "form": form, "lr": 10.0})
        assert step(opt).isfinite() and step(opt).isfinite()
        opt.detach()
        assert same_bits(model, before)


def test_returned_loss_is_the_clean_mean() -> None:
    model, b = build("llama", dtype=torch.float64), data()
    opt = SubZero(model, **BASE)
    with torch.no_grad():
        per_token = token_losses(model)(b)[:, :-1]
        mask = (b["attention_mask"][:, 1:] * b["attention_mask"][:, :-1]).bool()
        expected = per_token[mask].mean()
        words = model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, -1, WORDS]
        label = F.cross_entropy(words, b["labels"])
    got = opt.step({k: v for k, v in b.items() if k != "labels"}, next_token())
    assert got.dim() == 0 and got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    opt = SubZero(build("llama", dtype=torch.float64), **BASE)
    assert step(opt).item() == pytest.approx(label.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_dtypes_run_and_learn(form: str, dtype: torch.dtype) -> None:
    """Every credited weight moves, and the loss falls on one batch; the mode comes back."""
    model = build("llama", dtype=dtype).train()
    before = snapshot(model)
    opt = SubZero(
        model, **{**BASE, "form": form, "eps": 3e-2, "rule": "norm", "queries": 8, "lr": 0.2,
        "refresh_every": 100},
    )  # fmt: skip
    losses = [step(opt).item() for _ in range(12)]
    assert model.training and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.05
    opt.detach()
    credited = {e.name for e in opt.plan().entries}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in credited), name
        assert p.dtype == dtype and p.isfinite().all()


def test_a_scheduler_sets_the_rate() -> None:
    """lr = 0 in the second step: nothing moves."""
    model = build("llama")
    opt = SubZero(model, **{**BASE, "form": "full"})
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1.0 - min(epoch, 1))
    before = snapshot(model)
    step(opt)
    scheduler.step()
    assert not same_bits(model, before)
    before = snapshot(model)
    step(opt)
    assert same_bits(model, before)


def test_copies_are_plain_models() -> None:
    model, ids = build("llama"), data()["input_ids"]
    opt = SubZero(model, **{**BASE, "form": "right"})
    step(opt)
    with torch.no_grad():
        tuned = model(ids).logits
        twin = copy.deepcopy(model)
        step(opt)
        torch.testing.assert_close(twin(ids).logits, tuned)
        now = model(ids).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        torch.testing.assert_close(loaded(ids).logits, now)
    step(SubZero(twin, **BASE))
