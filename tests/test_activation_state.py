"""Activation noise: bases from data, steps that are skipped, and resumes, all bit for bit."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from test_activation_contract import BASE, FORMS, RULES, WORDS, data, step
from tiny_models import build, same_bits, snapshot
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero, label_words
from subzero_kernels import make_rng
from subzero_kernels.rng import normals


def everything(opt: SubZero) -> dict[str, Tensor]:
    """All that a skipped step must leave as it was."""
    weights = opt._weights
    found = {f"value {n}": s.value.clone() for n, s in weights.spaces()}
    found |= {f"w {n}": p.detach().clone() for n, p in opt.model.named_parameters()}
    found |= {n: v.clone() for n, v in weights.tensors().items()}
    found |= {f"state {k}": v.clone() for k, v in opt._rule_state["core"].items()}
    return found | {"decay": weights.decay.clone(), "folds": torch.tensor(weights.folds)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit; a rule's buffer may have been allocated, if it is zero."""
    for name in a.keys() | b.keys():
        if name not in a or name not in b:
            assert name.startswith("state"), name
            assert not (a.get(name, b.get(name))).any(), name  # type: ignore[union-attr]
            continue
        assert torch.equal(a[name], b[name]), name


# skipped steps


def objective_with(bad: float, path: str) -> LogitsLoss:
    """Label words, with one bad loss: of the clean group, of one query, or of the activations."""
    plain = label_words(WORDS)

    def fn(logits: Tensor, b: Any) -> Tensor:
        losses = plain.fn(logits, b).clone()
        clean = len(losses) == 3
        if (path == "clean") == clean or len(losses) > 3 and path == "clean":
            losses[0 if path == "clean" else -1] = bad
        return losses

    return LogitsLoss(fn, plain.positions, tokens=WORDS)


@pytest.mark.parametrize("path", ["clean", "query", "activations"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_is_not_finite_skips_the_step(form: str, rule: str, path: str) -> None:
    """As the very first step, and later: weights, state, V and rows seen stay bit for bit."""
    options = {**BASE, "form": form, "rule": rule, "weight_decay": 0.1, "refresh_every": 100}
    model = build("llama")
    opt = SubZero(model, **options)
    twin = SubZero(build("llama"), **options)  # skips the same draws with nothing bad in it

    def bad_step() -> None:
        before = everything(opt)
        count = opt.skipped
        if path == "activations":
            rows = model.model.layers[1].self_attn.v_proj
            handle = rows.register_forward_hook(lambda m, args, y: y * math.nan)
            step(opt)
            handle.remove()
        else:
            opt.step(data(seed=8), objective_with(math.inf, path))
        assert opt.skipped == count + 1
        same(everything(opt), before)
        twin.steps, twin.draws = opt.steps, opt.draws

    bad_step()
    assert opt._weights.seen == []
    for seed in (1, 2):
        for some in (opt, twin):
            step(some, seed)
        bad_step()
    for some in (opt, twin):
        step(some, 3)
        some.fold()
    assert opt.skipped == 3 and not opt.plan().whole_groups
    assert same_bits(model, snapshot(twin.model))
    assert not same_bits(model, snapshot(build("llama")))


def test_whole_groups_are_skipped_too() -> None:
    """A token loss that is not finite outside the positions read is nobody's business."""
    for at, skipped in ((2, 1), (5, 0)):
        model = build("llama")
        opt = SubZero(model, **{**BASE, "form": "right"})
        positions = torch.zeros(3, 7, dtype=torch.bool)
        positions[:, 2:4] = True

        def loss(b: dict[str, Tensor], model: nn.Module = model, at: int = at) -> Tensor:
            out = model(b["input_ids"], attention_mask=b["attention_mask"]).logits.sin().sum(-1)
            out[1, at] = math.nan
            return out

        opt.step(data(), loss, positions)
        assert opt.skipped == skipped


# bases


def singular(rows: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(rows, full_matrices=False)[2][:rank].T


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("form", ["core", "right"])
def test_bases_from_data(form: str, twice: bool) -> None:
    """V spans the top right-singular vectors of the rows x / |x|; no draw, no step, no weight."""
    model = build("gpt2", dtype=torch.float64)
    before = snapshot(model)
    opt = SubZero(model, **{**BASE, "form": form})
    batches = [data(4, seed=s) for s in range(3)]
    rows: list[Tensor] = []
    module = model.transformer.h[1].mlp.c_proj
    handle = module.register_forward_hook(
        lambda m, args, y: rows.append(args[0][:, -1] / args[0][:, -1].norm(dim=-1, keepdim=True))
    )
    if twice:  # other data first: it leaves nothing
        opt.bases_from(data(5, seed=9), label_words(WORDS))
        rows.clear()
    opt.bases_from(batches, label_words(WORDS))
    handle.remove()
    assert len(rows) == 3 and (opt.steps, opt.draws) == (0, 0) and same_bits(model, before)
    tap = next(t for t in opt._weights.taps if t.credit.name.endswith("1.mlp.c_proj.weight"))
    wanted = singular(torch.cat(rows), 3)
    torch.testing.assert_close(tap.basis @ tap.basis.T, wanted @ wanted.T)
    torch.testing.assert_close(tap.basis.T @ tap.basis, torch.eye(3, dtype=torch.float64))
    kept = tap.basis.clone()
    step(opt)
    assert torch.equal(tap.basis, kept)  # the first step's rows do not replace it
    with pytest.raises(ValueError, match="bases_from.*before the first step"):
        opt.bases_from(batches, label_words(WORDS))
    assert torch.equal(tap.basis, kept)


def test_bases_are_completed_by_the_contracts_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, three directions: the third is purpose 3's first column, orthogonalised."""
    monkeypatch.setenv("SUBZERO_BACKEND", "reference")
    model = build("llama", dtype=torch.float64)
    opt = SubZero(model, **{**BASE, "form": "right"})
    step(opt.__class__(build("llama"), **BASE))  # another optimizer changes nothing
    opt.step({k: v[:2] for k, v in data().items()}, label_words(WORDS))
    for tap, seen in zip(opt._weights.taps, opt._weights.seen, strict=True):
        v, n = singular(seen, 2), tap.credit.n
        z = normals(make_rng(11, 0), 3 << 28 | tap.credit.index, 3 * n).double().view(n, 3)[:, 0]
        z = z - v @ (v.T @ z)
        wanted = torch.cat([v, (z / z.norm())[:, None]], 1)
        torch.testing.assert_close(tap.basis @ tap.basis.T, wanted @ wanted.T)
        assert (tap.basis[:, 2] @ z) > 0


def test_a_new_window_takes_the_last_rows_seen() -> None:
    """At most 4 r of each linear, the newest; seen by skipped steps: none."""
    model = build("llama", dtype=torch.float64)
    opt = SubZero(model, **{**BASE, "form": "right", "refresh_every": 6})
    rows: list[Tensor] = []
    module = model.model.layers[1].mlp.down_proj
    for seed in range(6):
        batch = data(seed=seed)
        objective = label_words(WORDS)
        grabbed: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda m, args, y, to=grabbed: to.append(args[0][:3, -1])
        )
        if seed == 4:
            objective = objective_with(math.nan, "query")
        opt.step(batch, objective)
        handle.remove()
        if seed != 4:
            rows.append(grabbed[0] / grabbed[0].norm(dim=-1, keepdim=True))
    tap = next(t for t in opt._weights.taps if t.credit.name.endswith("1.mlp.down_proj.weight"))
    old = tap.basis.clone()
    step(opt)
    assert opt.window == 1 and not torch.allclose(old.abs(), tap.basis.abs())
    wanted = singular(torch.cat(rows)[-12:], 3)
    torch.testing.assert_close(tap.basis @ tap.basis.T, wanted @ wanted.T)


# resuming


def saved(opt: SubZero, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bit_for_bit(form: str, rule: str, dtype: torch.dtype) -> None:
    """In mid-window: losses, weights and all state go on as in the run that was not interrupted."""
    options = {
        **BASE, "form": form, "rule": rule, "weight_decay": 0.1, "lr": 0.05,
        "state_at_refresh": "keep" if rule in ("muon", "sgd") else "reset",
    }  # fmt: skip
    model = build("llama", dtype=dtype)
    opt = SubZero(model, **options)
    for seed in range(4):  # into the second window
        step(opt, seed)
    weights, state = saved(opt, model)
    other = build("llama", seed=5, dtype=dtype)
    again = SubZero(other, **options)
    step(again, 7)  # whatever it had is gone
    other.load_state_dict(weights)
    again.load_state_dict(state)
    same(everything(again), everything(opt))
    for seed in range(4, 8):  # across the next refresh
        assert torch.equal(step(opt, seed), step(again, seed))
    opt.fold()
    again.fold()
    same(everything(again), everything(opt))
    assert (opt.steps, opt.draws, opt.window) == (again.steps, again.draws, again.window)


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_resume_before_the_first_step(form: str, based: bool) -> None:
    """With bases from data, and without any."""
    model = build("llama")
    opt = SubZero(model, **{**BASE, "form": form})
    if based:
        opt.bases_from(data(5, seed=3), label_words(WORDS))
    weights, state = saved(opt, model)
    assert any(n.startswith("basis") for n in state["tensors"]) == (based and form != "full")
    other = build("llama", seed=5)
    again = SubZero(other, **{**BASE, "form": form})
    step(again, 7)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for seed in range(4):
        assert torch.equal(step(opt, seed), step(again, seed))
    opt.fold()
    again.fold()
    assert same_bits(other, snapshot(model))


def without(state: dict[str, Any], kind: str) -> None:
    tensors = state["tensors"]
    state["tensors"] = {n: v for n, v in tensors.items() if not n.startswith(kind)}


@pytest.mark.parametrize("name", ["basis.0", "seen.0"])
def test_form_full_takes_no_bases(name: str) -> None:
    opt = SubZero(build("llama"), **{**BASE, "form": "full"})
    step(opt)
    state = opt.state_dict()
    credit = opt._weights.taps[0].credit
    shape = (credit.n, credit.rank) if name == "basis.0" else (3, credit.n)
    state["tensors"][name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"expected no tensor {name}"):
        opt.load_state_dict(state)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["options"].update(form="core"), "form"),
        (lambda s: s["options"].update(discount=0.5), "discount"),
        (lambda s: s["tensors"].update({"basis.0": torch.zeros(3, 3)}), "basis.0"),
        (lambda s: s["tensors"].update({"basis.99": torch.zeros(32, 3)}), "basis.99"),
        (lambda s: s["tensors"].update({"core.momentum": torch.zeros(3)}), "core.momentum"),
        (lambda s: s["parameters"][0].__setitem__(3, "side"), "parameter"),
        (lambda s: s["tensors"].pop("basis.1"), "expected the tensor basis.1"),
        (lambda s: s["tensors"].pop("basis.0"), "expected the tensor basis.0"),
        (lambda s: s["tensors"].pop("seen.2"), "expected the tensor seen.2"),
        (lambda s: without(s, "basis"), "expected the tensor basis.0"),
    ],
)
def test_a_foreign_state_changes_nothing(change: Any, message: str) -> None:
    """Nor does one that lacks what belongs to it."""
    model = build("llama")
    opt = SubZero(model, **{**BASE, "form": "right", "rule": "momentum"})
    step(opt)
    state = copy.deepcopy(opt.state_dict())
    change(state)
    before = everything(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    same(everything(opt), before)
    step(opt)


def test_bases_of_very_many_rows_take_some_of_them() -> None:
    """16 r of them in even steps: the decomposition of all would take minutes."""
    model = build("llama", dtype=torch.float64)
    opt = SubZero(model, **{**BASE, "form": "right", "rank": 2, "where": "all"})
    rows: list[Tensor] = []
    module = model.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda m, args, y: rows.append(args[0].flatten(0, 1)))
    ids = torch.randint(0, 96, (5, 20), generator=torch.Generator().manual_seed(4))
    opt.bases_from({"input_ids": ids, "labels": torch.zeros(5, dtype=torch.long)},
                   label_words(WORDS))  # fmt: skip
    handle.remove()
    tap = next(t for t in opt._weights.taps if t.credit.name.endswith("1.mlp.down_proj.weight"))
    units = rows[0] / rows[0].norm(dim=1, keepdim=True)
    wanted = singular(units[::4], 2)  # 100 rows, at most 32
    torch.testing.assert_close(tap.basis @ tap.basis.T, wanted @ wanted.T)
