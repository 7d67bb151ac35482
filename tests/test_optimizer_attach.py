"""What attaching leaves alone, which parameters go which way, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BUILDERS, batch, build, closure, per_example, same_bits, snapshot
from torch import Tensor, nn

from subzero import SubZero
from subzero_kernels import make_rng


def test_attaching_changes_nothing_a_user_can_see() -> None:
    model, b = build("gpt2"), batch()
    before = snapshot(model)
    names = list(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    forwards = [m.forward for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    storages = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        plain = model(**b).logits
    opt = SubZero(model, rank=4)
    with torch.no_grad():
        torch.testing.assert_close(model(**b).logits, plain)
    assert names == list(model.state_dict())
    assert kinds == [type(m) for m in model.modules()]
    assert forwards == [m.forward for m in model.modules()]
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert storages == [p.data_ptr() for p in model.parameters()]
    assert same_bits(model, before)
    opt.detach()
    for m in model.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks and not m._state_dict_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(**b).logits, plain)


def test_overridden_forwards_still_run() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = Doubled(6, 5)
    x = torch.randn(4, 6)
    opt = SubZero(model, lr=0.0, eps=0.5, rank=2, queries=1)
    seen = []
    opt.step(lambda: seen.append(model(x)) or model(x).sum())
    opt.detach()
    swing = seen[0] - seen[1]  # 2 * (x P^T) * 2 eps with P the perturbation
    u, v = opt._weights._bases[0]
    core = torch.zeros(4)
    space = dict(opt._weights.spaces())["core"]
    space.add_noise_(core, torch.ones(1), make_rng(0, 0))
    bias = torch.zeros(5)
    dict(opt._weights.spaces())["dense"].add_noise_(bias, torch.ones(1), make_rng(0, 0))
    expected = 2 * 2 * 0.5 * (x @ (u @ core.view(2, 2) @ v.T).T + bias)
    torch.testing.assert_close(swing, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_plan_names_every_parameter(name: str) -> None:
    model = build(name)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    plan = SubZero(model, rank=40).plan()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [e.name for e in plan.entries] == trained
    assert [e.index for e in plan.entries] == [
        i for i, (_, p) in enumerate(model.named_parameters()) if p.requires_grad
    ]
    text = str(plan)
    assert all(n in text for n in trained)
    assert all(e.rank == min(40, *e.factor) for e in plan.factored)
    assert all(sum(s > 1 for s in e.param.shape) <= 1 for e in plan.dense)
    if name == "mixtral":
        ways = {e.name: e.way for e in plan.entries}
        assert ways["model.layers.0.mlp.experts.gate_up_proj"] == "copy"
        assert "copies" in text and "one after another" in text
    elif name == "t5":
        assert "relative_attention_bias" in plan.one_by_one
    else:
        assert {e.way for e in plan.entries} == {"side path", "fp32 value"}
        assert not plan.one_by_one


@pytest.mark.parametrize("name", ["mixtral", "t5", "gpt2"])
def test_a_failing_closure_leaves_everything_as_it_was(name: str) -> None:
    model, b = build(name), batch()
    before = snapshot(model)
    model.train()
    model.get_submodule("lm_head").training = False
    modes = [m.training for m in model.modules()]
    opt = SubZero(model, lr=0.1, rank=4, queries=2)
    calls = iter([0, 0, 1])

    def fails() -> Tensor:
        assert not any(m.training for m in model.modules())
        loss = closure(model, b)()
        if next(calls):
            raise ZeroDivisionError("in the closure")
        return loss

    with pytest.raises(ZeroDivisionError):
        opt.step(fails)
    assert same_bits(model, before)
    assert modes == [m.training for m in model.modules()]
    assert opt.steps == opt.draws == 0
    with torch.no_grad():
        torch.testing.assert_close(per_example(model.eval())(b), per_example(build(name))(b))
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_error_inside_the_forward_leaves_the_side_path() -> None:
    model = build("llama")
    opt = SubZero(model, rank=4)
    with pytest.raises(IndexError):
        opt.step(lambda: model(input_ids=torch.full((2, 3), 1000)).logits.sum())
    assert not torch.overrides._get_current_function_mode_stack()
    opt.step(closure(model, batch()))


def test_frozen_blocks_run_once_for_all_groups() -> None:
    losses = []
    for share in (True, False):
        model, b = build("llama"), batch()
        rows: list[int] = []
        model.model.layers[0].mlp.register_forward_hook(lambda m, a, y, r=rows: r.append(len(y)))
        for p in model.parameters():
            p.requires_grad_(False)
        for p in model.model.layers[1].parameters():
            p.requires_grad_(True)
        opt = SubZero(model, lr=1e-2, rank=4, queries=3, sides="one")
        assert opt.plan().shared == ["model.layers.0"]
        if not share:
            opt.plan().one_by_one = "asked by the test"
        losses += [opt.step(b, per_example(model)) for _ in range(2)]
        assert rows == ([3, 3] if share else [3] * 8)
    assert torch.allclose(torch.stack(losses[:2]), torch.stack(losses[2:]), rtol=1e-6)


def test_blocks_behind_something_trained_are_not_shared() -> None:
    model, b = build("llama"), batch()
    rows: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, y: rows.append(len(y)))
    for p in model.model.layers.parameters():
        p.requires_grad_(False)  # the embedding below stays trained
    SubZero(model, rank=4).step(b, per_example(model))
    assert rows == [6]


def test_inputs_without_a_batch_axis_fall_back_to_one_by_one() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.register_buffer("table", torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.proj(self.table).sum(0)

    torch.manual_seed(0)
    model = Table()
    x = torch.randn(3, 4)
    opt = SubZero(model, lr=0.0, rank=2)
    loss = opt.step(x, lambda x: model(x).square().mean(1))
    assert "proj" in opt.plan().one_by_one and "batch axis" in str(opt.plan())
    assert loss.item() == pytest.approx(opt.step(lambda: model(x).square().mean()).item(), rel=0.2)


def test_weights_read_outside_their_module_are_named() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.seen = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.seen(F.linear(x, self.hidden.weight))

    model = Reader()
    with pytest.warns(UserWarning, match="hidden.weight"):
        SubZero(model, rank=2).step(lambda: model(torch.ones(2, 4)).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        SubZero(other, rank=2).step(lambda: other(torch.ones(2, 4)).sum())


def test_lora_tensors_are_reshaped_and_exact() -> None:
    peft = pytest.importorskip("peft")
    outputs = []
    for apply in ("forward", "in_place"):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            build("llama"),
            peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=4),
        )
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_" in n:
                    p.normal_(0, 0.1)
        opt = SubZero(model, lr=1e-2, eps=1e-2, rank=8, apply=apply, reshape="grouped")
        factors = {tuple(e.param.shape): e.factor for e in opt.plan().factored}
        assert factors[(2, 32)] == (8, 8) and factors[(32, 2)] in ((8, 8), (16, 4))
        if apply == "forward":
            assert {e.way for e in opt.plan().factored} == {"side path"}
        b = batch()
        seen: list[Tensor] = []

        def loss(model: nn.Module = model, b: Any = b, seen: list[Tensor] = seen) -> Tensor:
            seen.append(per_example(model)(b))
            return seen[-1].mean()

        opt.step(loss)
        opt.fold()
        with torch.no_grad():
            outputs.append(torch.stack([*seen, per_example(model)(b)]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-3


def test_functions_called_by_keyword_take_the_side_path() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.norm, self.rms, self.out = nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 3)
            for module in (self.table, self.norm, self.rms, self.out):
                module.forward = getattr(self, f"_{type(module).__name__}")  # type: ignore

        def _Embedding(self, ids: Tensor) -> Tensor:
            return F.embedding(input=ids, weight=self.table.weight)

        def _LayerNorm(self, x: Tensor) -> Tensor:
            norm = self.norm
            return F.layer_norm(input=x, normalized_shape=(4,), weight=norm.weight, bias=norm.bias)

        def _RMSNorm(self, x: Tensor) -> Tensor:
            return F.rms_norm(input=x, normalized_shape=(4,), weight=self.rms.weight)

        def _Linear(self, x: Tensor) -> Tensor:
            return F.linear(input=x, weight=self.out.weight, bias=self.out.bias)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.rms(self.norm(self.table(ids))))

    torch.manual_seed(0)
    by_keyword = Keywords()
    plain = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 3))
    with torch.no_grad():
        for a, b in zip(plain.parameters(), by_keyword.parameters(), strict=True):
            a.copy_(b)
    ids = torch.randint(0, 7, (3, 5))
    seen = []
    for model in (by_keyword, plain):
        opt = SubZero(model, lr=1e-2, eps=0.1, rank=2, queries=2)
        losses: list[Tensor] = []

        def objective(ids: Tensor, model: nn.Module = model, losses: list = losses) -> Tensor:
            losses.append(model(ids).square().mean((1, 2)))
            return losses[-1]

        opt.step(ids, objective)
        seen.append(losses[0])
    torch.testing.assert_close(seen[0], seen[1])
    assert seen[0].view(4, 3).std(0).min() > 1e-4  # the groups differ


def test_a_second_optimizer_on_the_same_model_is_refused() -> None:
    model = nn.Linear(4, 4)
    opt = SubZero(model, rank=2)
    with pytest.raises(ValueError, match="detach"):
        SubZero(model, rank=2)
    opt.detach()
    SubZero(model, rank=2)


def test_gradients_flow_between_steps() -> None:
    model, b = build("llama"), batch()
    opt = SubZero(model, lr=1e-2, rank=4)
    opt.step(closure(model, b))
    per_example(model)(b).mean().backward()
    with torch.no_grad():
        now = per_example(model)(b)
    torch.testing.assert_close(per_example(model)(b), now, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "rank: expected an integer of at least 1, got 0"),
        (dict(rank=2.0), "rank"),
        (dict(queries=0), "queries"),
        (dict(refresh_every=0), "refresh_every"),
        (dict(lr=-1.0), "lr"),
        (dict(lr=math.nan), "lr"),
        (dict(eps=0.0), "eps"),
        (dict(sides="three"), "sides"),
        (dict(rule="lion"), "rule"),
        (dict(rule="norm"), "queries: expected at least 4"),
        (dict(apply="copy"), "apply"),
        (dict(noise="activation"), "noise"),
        (dict(momentum=1.0), "momentum"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(fold_rounding="up"), "fold_rounding"),
        (dict(reshape="triangle"), "reshape"),
        (dict(seed=1 << 63), "seed"),
    ],
)
def test_bad_options_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubZero(linear(), **options)


def test_bad_models_and_closures() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        SubZero(linear().requires_grad_(False))
    with pytest.raises(TypeError, match="model"):
        SubZero(linear().parameters())
    model = linear()
    before = snapshot(model)
    opt = SubZero(model, rank=2, lr=1.0)
    x = torch.ones(5, 4)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((lambda: model(x)[0, :2],), ValueError, r"shape \(2,\)"),
        ((lambda: None,), TypeError, "NoneType"),
        ((lambda: "0.5",), TypeError, "str"),
        ((x,), TypeError, "objective"),
        ((x, 3), TypeError, "objective"),
        (([], lambda b: b), ValueError, "empty list"),
        (({"n": 3}, lambda b: b), TypeError, "batch"),
        ((x, lambda b: model(b).sum()), ValueError, r"shape \(10,\)"),
        ((x, lambda b: model(b)), ValueError, r"shape \(10,\)"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            opt.step(*args)
        assert same_bits(model, before) and opt.steps == 0
    with pytest.raises(ValueError, match="param_group"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.filterwarnings("ignore:SubZero")  # the closure reads no parameter
@pytest.mark.parametrize(
    "value", [0.5, torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)]
)
def test_any_scalar_is_a_loss(value: Any) -> None:
    model = linear()
    assert SubZero(model, rank=2).step(lambda: value).item() == 0.5
