"""A step never waits for the device: no value is read from it, and nothing is copied to it.

The meta device stands in for a GPU. It has no values, so whatever reads one fails; a dispatch mode
refuses what copies between devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import batch, build, per_example
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subzero import LogitsLoss, SubZero, label_words

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")


class NoHost(TorchDispatchMode):
    """Raises where an op reads from the device or takes tensors of two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.device.type == "meta" for t in tensors):
            assert name not in READS, f"{name} reads from the device"
            # a number as an operand is a kernel's argument, and fill_ takes it as one
            others = [t for t in tensors if t.device.type != "meta" and t.dim()]
            assert not others, f"{name} copies between devices"
            assert name not in ("copy_", "_to_copy") or len({t.device for t in tensors}) == 1
        return out


@pytest.fixture(autouse=True)
def _as_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks whether a mask has padding, except where a graph is captured."""
    import transformers.masking_utils as masks

    monkeypatch.setattr(masks, "is_tracing", lambda tensor=None: True)


def on_meta(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    return build(name).to("meta"), {k: v.to("meta") for k, v in batch().items()}


def token_losses(model: nn.Module) -> Any:
    def loss(b: dict[str, Tensor]) -> Tensor:
        return model(**{k: v for k, v in b.items() if k != "labels"}).logits.float().logsumexp(-1)

    return loss


@contextmanager
def stepping(opt: SubZero) -> Iterator[None]:
    """Whatever a step makes once is there, and none reads."""
    with NoHost():
        yield
    assert opt.steps


@pytest.mark.parametrize(
    ("rule", "apply"),
    [(rule, "forward") for rule in ("sgd", "momentum", "adam", "norm", "muon")]
    + [("sgd", "in_place")],  # once: plans of meta tensors take seconds
)
def test_no_rule_and_no_way_of_applying_waits(rule: str, apply: str) -> None:
    model, b = on_meta("llama")
    if apply == "in_place":
        model.requires_grad_(False)
        model.model.layers[0].self_attn.requires_grad_(True)
    opt = SubZero(
        model, rank=4, queries=4, rule=rule, apply=apply, refresh_every=2, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    with stepping(opt):
        for _ in range(5):  # windows open at the third and the fifth
            opt.step(b, per_example(model))
            schedule.step()
        opt.step(lambda: per_example(model)(b).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "t5", "bert"])
def test_no_model_makes_a_step_wait(name: str) -> None:
    model, b = on_meta(name)
    opt = SubZero(model, rank=4, sides="one", rule="momentum", weight_decay=0.1)
    with stepping(opt):
        for _ in range(2):
            opt.step([b, b], per_example(model))
        opt.step(lambda: per_example(model)(b).mean())


@pytest.mark.parametrize("kind", ["labels", "positions", "words", "packed"])
def test_no_objective_waits(kind: str) -> None:
    model, b = on_meta("llama")
    opt = SubZero(model, rank=4)
    objective: Any = token_losses(model)
    positions = None
    if kind == "labels":
        b["labels"] = b["input_ids"]
    if kind == "positions":
        positions = b["attention_mask"].bool()
    if kind == "words":
        b["labels"] = torch.zeros(3, dtype=torch.long, device="meta")
        objective = label_words([5, 7])
    if kind == "packed":
        b["position_ids"] = b["input_ids"]
        del b["attention_mask"]
    with stepping(opt):
        for _ in range(2):
            opt.step(b, objective, positions)


def test_numbers_may_be_tensors_on_the_device() -> None:
    model, b = on_meta("llama")
    lr = torch.tensor(1e-3, device="meta")
    opt = SubZero(model, rank=4, lr=lr)  # type: ignore[arg-type]
    with stepping(opt):
        opt.step(b, per_example(model))


def test_a_read_would_be_seen() -> None:
    model, b = on_meta("llama")
    opt = SubZero(model, rank=4)

    def reads(b: dict[str, Tensor]) -> Tensor:
        loss = per_example(model)(b)
        return loss * float(loss.sum())

    with NoHost(), pytest.raises((RuntimeError, AssertionError)):
        opt.step(b, reads)
    with NoHost(), pytest.raises(AssertionError, match="copies between devices"):
        torch.arange(3).to("meta")
    # how many positions a loss reads must be known, or is read once
    some = LogitsLoss(lambda x, b: x.sum((1, 2)), b["attention_mask"].bool())
    with NoHost(), pytest.raises((RuntimeError, AssertionError)):
        opt.step(b, some)


# activation noise


def activation(model: nn.Module, form: str, **options: Any) -> SubZero:
    """An optimizer after its first step: bases are known, and whether queries cost a row."""
    opt = SubZero(
        model, noise="activation", form=form, rank=4, queries=3, refresh_every=100, **options
    )
    if form != "full":
        taps = opt._weights.taps
        opt._weights._set_bases([tap.credit.param.new_zeros(tap.credit.n, 4) for tap in taps])
        opt._weights._seen_rows()
    opt._weights._met_checked = True
    opt._queries._tried = {False, True}
    return opt


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "norm", "muon"])
@pytest.mark.parametrize("form", ["core", "right", "full"])
def test_activation_noise_does_not_wait(form: str, rule: str) -> None:
    model, b = on_meta("llama")
    b["labels"] = torch.zeros(3, dtype=torch.long, device="meta")
    opt = activation(model, form, rule=rule, weight_decay=0.1)
    with stepping(opt):
        for _ in range(2):
            opt.step([b, b], label_words([5, 7]))
    assert opt._queries.decodes


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("where", ["loss", "all"])
def test_activation_noise_of_whole_groups_does_not_wait(where: str, name: str) -> None:
    """A plain objective, and token losses: none tells how many positions it reads."""
    model, b = on_meta(name)
    opt = activation(model, "core", rule="muon", where=where, discount=0.5)
    with stepping(opt):
        opt.step(b, per_example(model), b["attention_mask"])
        b["labels"] = b["input_ids"]
        opt.step(b, token_losses(model))
