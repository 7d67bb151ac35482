"""What the plan of activation noise says, and that it is true of the models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_activation_contract import BASE, WORDS, data, step
from tiny_models import build, same_bits, snapshot
from torch import Tensor, nn

from subzero import SubZero, label_words
from subzero.credit import CreditPlan, make_credit_plan

# the linears of a block that write to the residual stream: the last one carries their noise
BLOCK = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen2": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma": ["self_attn.o_proj", "mlp.down_proj"],
    "mistral": ["self_attn.o_proj", "mlp.down_proj"],
    "phi3": ["self_attn.o_proj", "mlp.down_proj"],
    "mixtral": ["self_attn.o_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "phi": ["self_attn.dense", "mlp.fc2"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "gptj": ["attn.out_proj", "mlp.fc_out"],
}
OWN = {
    "gemma2": "norms an output before or as it joins the stream",
    "gemma3": "norms an output before or as it joins the stream",
    "olmo2": "norms an output before it joins the stream",
    "opt post-norm": "the norm follows the residual sum",
    "bert": "an encoder",
    "t5": "encoder-decoder",
}


def plan(model: nn.Module, **options: Any) -> CreditPlan:
    given = dict(form="right", credit="block", where="loss", rank=3)
    return make_credit_plan(model, **{**given, **options})


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))


@pytest.mark.parametrize("name", BLOCK)
def test_block_credit_by_family(name: str) -> None:
    """Writers share the last one's noise; the block's other linears have their own."""
    model = build(name)
    path, inside = blocks(model)
    made = plan(model)
    assert made.why_own == ""
    by_name = {e.name: e for e in made.entries}
    for i in range(len(inside)):
        writers = [by_name[f"{path}.{i}.{w}.weight"] for w in BLOCK[name]]
        assert [w.noisy for w in writers] == [False] * (len(writers) - 1) + [True]
        assert {w.source for w in writers} == {writers[-1].index}
        others = [e for e in made.entries if e.name.startswith(f"{path}.{i}.")]
        for e in others:
            if e not in writers:
                assert e.noisy and "does not write to the residual stream" in e.why
    text = str(made)
    for e in made.entries:
        line = next(line for line in text.splitlines() if line.startswith(f"{e.name} "))
        noise = "its own noise" if e.noisy else f"noise on {names(model)[e.source]}"
        assert noise in line and e.why in line
    assert f"noise on {sum(e.noisy for e in made.entries)} outputs" in text


def names(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", [n for n in BLOCK if n != "mixtral"])  # experts come after it
def test_what_a_writer_adds_reaches_the_stream_as_it_is(name: str) -> None:
    """Adding d to the last writer's output adds exactly d to the block's output."""
    model = build(name, dtype=torch.float64)
    path, inside = blocks(model)
    last = inside[1].get_submodule(BLOCK[name][-1])
    d = torch.randn(32, dtype=torch.float64)
    got: list[Tensor] = []
    inside[1].register_forward_hook(
        lambda m, args, out: got.append((out if isinstance(out, Tensor) else out[0]).clone())
    )
    ids = data()["input_ids"]
    with torch.no_grad():
        model(ids)
        handle = last.register_forward_hook(lambda m, args, y: y + d)
        model(ids)
        handle.remove()
    change = (got[1] - got[0]).view(-1, 32)
    torch.testing.assert_close(change, d.expand_as(change), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OWN)
def test_own_credit_where_noise_would_not_arrive(name: str) -> None:
    """Norms after the sum or on an output, encoders: each linear is credited by its own noise."""
    made = plan(build(name), where="all")
    assert OWN[name] in made.why_own and OWN[name] in str(made)
    assert all(e.noisy for e in made.entries) and len(made.entries) >= 8


def test_what_is_left_alone_and_why() -> None:
    """Everything that requires grad is in the plan: credited, or left with a reason."""
    model = build("llama untied")
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    made = plan(model)
    left = {n: why for n, _, why in made.left}
    assert left["lm_head.weight"] == "outside the model's blocks"
    assert "Embedding is no Linear" in left["model.embed_tokens.weight"]
    assert "norm of LlamaRMSNorm" in left["model.norm.weight"]
    assert (
        "bias of Linear"
        in {n: w for n, _, w in plan(build("opt")).left}["model.decoder.layers.0.fc1.bias"]
    )
    experts = {n: w for n, _, w in plan(build("mixtral")).left}
    assert any("experts" in n for n in experts)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == left.keys() | {e.name for e in made.entries}
    assert made.frozen == model.model.layers[0].mlp.up_proj.weight.numel()
    assert f"{len(left)} parameters require grad and stay as they are" in str(made)
    with pytest.raises(ValueError, match="model: expected a weight"):
        plan(build("falcon"))  # its linears multiply by code of their own
    shared = build("llama")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    assert "shared with model.layers.1.mlp.up_proj" in {w for *_, w in plan(shared).left}
    encoder = {n: why for n, _, why in plan(build("t5")).left}
    assert encoder["encoder.block.0.layer.0.SelfAttention.q.weight"] == (
        "where='loss' reads no row of the encoder"
    )


def test_a_state_and_cost_are_named() -> None:
    opt = SubZero(build("llama"), **BASE)
    assert "queries: a row each, decoded on the clean forward's keys and values" in str(opt.plan())
    assert "form right, rank 3" in str(opt.plan()) and "credit block" in str(opt.plan())
    model = build("llama")
    model.model.layers[0].requires_grad_(False)
    opt = SubZero(model, **{**BASE, "where": "all"})
    assert "run once for all groups: model.layers.0 (no noise there)" in str(opt.plan())


@pytest.mark.parametrize("form", ["core", "right", "full"])
@pytest.mark.parametrize("where", ["loss", "all"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_run(name: str, where: str, form: str) -> None:
    """Own credit, whole groups, labels: the loss falls, and only what the plan credits moves."""
    model = build(name)
    before = snapshot(model)
    options = dict(BASE, form=form, where=where, lr=0.3, rule="norm", queries=16, eps=1e-2)
    opt = SubZero(model, **{**options, "refresh_every": 50})
    b: dict[str, Tensor] = {k: v for k, v in data().items() if k != "labels"}
    labels = torch.full((3, 4), -100)
    labels[:, :2] = torch.tensor([[5, 6], [7, 8], [9, 10]])
    if name == "bert":
        labels = torch.where(torch.arange(7) % 3 == 1, b["input_ids"], -100)
    objective: Any = label_like(model, labels)
    losses = [opt.step({**b, "labels": labels}, objective).item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.01 and not opt.skipped
    opt.fold()
    credited = {e.name for e in opt.plan().entries}
    assert any("encoder" in n for n in credited) == (name == "bert" or where == "all")
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n not in credited), n


def label_like(model: nn.Module, labels: Tensor) -> Any:
    """A plain objective: cross entropy of the labelled tokens, one loss an example."""

    def loss(b: dict[str, Tensor]) -> Tensor:
        logits = model(**b).logits
        each = nn.functional.cross_entropy(
            logits.transpose(1, 2), b["labels"], ignore_index=-100, reduction="none"
        )
        return each.sum(1) / (b["labels"] != -100).sum(1)

    return loss


# adapters


def with_lora(trainable_base: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"])
    model = get_peft_model(build("llama"), config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
            if trainable_base and "base_layer" in n:
                p.requires_grad_(True)
    return model


@pytest.mark.parametrize("form", ["core", "right", "full"])
def test_an_adapter_on_a_frozen_base_is_trained(form: str) -> None:
    """lora_A and lora_B have noise of their own; the base stays."""
    model = with_lora(False)
    before = snapshot(model)
    opt = SubZero(model, **{**BASE, "form": form, "lr": 0.1, "rule": "norm", "queries": 8})
    credited = {e.name for e in opt.plan().entries}
    assert len(credited) == 12 and all("lora_" in n for n in credited)
    assert all(e.noisy and "adapter" in e.why for e in opt.plan().entries)
    assert opt.plan().whole_groups == ""
    losses = [step(opt).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    opt.detach()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n not in credited), n
    with pytest.raises(ValueError, match="rank: expected at most 3"):
        SubZero(with_lora(False), **{**BASE, "rank": 4, "form": form if form != "full" else "core"})


def test_a_trainable_base_under_an_adapter() -> None:
    """base_layer writes to the stream; the adapter beside it has its own noise."""
    model = with_lora(True)
    opt = SubZero(model, **{**BASE, "form": "full"})
    by_name = {e.name: e for e in opt.plan().entries}
    path = "base_model.model.model.layers.1."
    o = by_name[path + "self_attn.o_proj.base_layer.weight"]
    down = by_name[path + "mlp.down_proj.base_layer.weight"]
    assert down.noisy and o.source == down.index
    assert by_name[path + "mlp.down_proj.lora_B.default.weight"].noisy
    before = snapshot(model)
    step(opt)
    for e in opt.plan().entries:
        assert not torch.equal(e.param, before[e.name]), e.name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_export_is_an_adapter_over_the_windows_start(family: str, tmp_path: Path) -> None:
    """peft loads it over the weights as folded at the window's start: the live model's logits."""
    from peft import PeftModel

    model = build(family)
    opt = SubZero(model, **{**BASE, "form": "right", "lr": 0.2, "rule": "norm", "queries": 8})
    with pytest.raises(ValueError, match="export_lora"):
        opt.export_lora(tmp_path / "none")
    for seed in range(5):  # into the second window
        step(opt, seed)
    before = snapshot(model)
    ids = data()["input_ids"]
    with torch.no_grad():
        live = model(ids).logits
        opt.export_lora(tmp_path / "lora")
        assert same_bits(model, before)
        opt.export_lora(tmp_path / "lora")  # again, over the old one
        base = build(family, seed=9)
        base.load_state_dict(before, strict=False)
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
        got = loaded(ids).logits
        torch.testing.assert_close(got, live, rtol=1e-4, atol=1e-4 * float(live.abs().max()))
        assert (got - plain).norm() > 0.01 * plain.norm()
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, live, rtol=1e-4, atol=1e-4)
    opt.step(data(), label_words(WORDS))


def test_export_needs_form_right(tmp_path: Path) -> None:
    for options in (dict(form="core"), dict(form="full")):
        opt = SubZero(build("llama"), **{**BASE, **options})
        step(opt)
        with pytest.raises(ValueError, match="form='right'"):
            opt.export_lora(tmp_path / "x")
    with pytest.raises(ValueError, match="noise='activation'"):
        SubZero(build("llama")).export_lora(tmp_path / "x")
    opt = SubZero(with_lora(False), **{**BASE, "form": "right"})
    step(opt)
    with pytest.raises(ValueError, match="without an adapter"):
        opt.export_lora(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_export_that_fails_says_so_in_its_own_words(tmp_path: Path) -> None:
    """An OSError that names no option of a command, and leaves the folder as it was."""
    opt = SubZero(build("llama"), **{**BASE, "form": "right"})
    step(opt)
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="^export_lora: the adapter could not be written to .*fi"):
            opt.export_lora(target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
