"""Captured steps of activation noise: positions, errors, memory, and steps that do not wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_activation_cases import FORMS, OPTIONS, WORDS, data, equal_steps, twins
from capture_cases import (
    assert_same,
    device_fixture,  # noqa: F401
    emulated,  # noqa: F401
    on_gpu,
    on_graphs,
    waiting_is_an_error,
)
from tiny_models import per_example
from torch import Tensor

from subzero import LogitsLoss, SubZero, label_words, next_token


@on_graphs
def test_more_positions_than_captured(device: str) -> None:
    _, captured = twins("llama", device, refresh_every=100)
    b = data(1, device)[0]
    few, many, wide = (torch.zeros(3, 7, dtype=torch.bool, device=device) for _ in range(3))
    few[:, 3:5] = True
    many[:, 2:6] = True
    wide[:, 3] = wide[:, 6] = True
    del b["labels"]
    run = captured.capture(b, next_token(), few)
    for _ in range(2):
        assert torch.isfinite(run(b, few))
    there = {k: v.cpu() for k, v in b.items()}
    with pytest.raises(ValueError, match="at most 2 scored positions in an example.*got 4; capt"):
        run(there, many.cpu())
    with pytest.raises(ValueError, match="at most 2 tokens from the first scored.*got 3; capture"):
        run(there, wide[:, [0, 1, 2, 3, 4, 6, 5]].cpu())
    assert captured.steps == 2
    if device == "cuda":  # where the mask is not read before the step
        run(b, many)
        assert captured.skipped == 1


def test_a_step_of_more_positions_than_known_is_skipped() -> None:
    opt, _ = twins("llama", "cpu")
    b = data(1, "cpu")[0]
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 3:5] = True
    del b["labels"]
    opt.step(b, next_token(), mask)
    known = opt._queries.bind(b, next_token(), mask)[0].extent
    assert known is not None and (known.width, known.length) == (2, 2)
    wider = mask.clone()
    wider[0, 5] = True
    for some, finite in ((mask, True), (wider, False)):
        micros = opt._queries.bind(b, next_token(), some, [known])
        with torch.no_grad():
            outcome = opt._queries.evaluate(micros, next_token(), 1e-2, opt._rng)
        assert bool(outcome.finite) == finite
        assert bool(outcome.weight["main"].any()) == finite


@on_graphs
def test_what_cannot_be_captured_says_why_and_leaves_no_trace(device: str) -> None:
    step, captured = twins("llama", device)
    b = data(1, device)[0]

    def reads(logits: Tensor, b: Any) -> Tensor:
        loss = label_words(WORDS).fn(logits, b)
        return loss if loss.sum().item() > 0 else -loss

    bad = LogitsLoss(reads, label_words(WORDS).positions, tokens=WORDS, width=1)
    with pytest.raises(RuntimeError, match="capture: expected .* synchroniz.*; keep the model"):
        captured.capture(b, bad)
    assert_same(step, captured)
    assert not captured._weights.ready and captured._weights.tensors() == {}
    run = captured.capture(b, label_words(WORDS))
    assert torch.equal(run(b), step.step(b, label_words(WORDS)))


@on_gpu
def test_a_replay_allocates_nothing(device: str) -> None:
    _, captured = twins("llama", device, rule="muon", refresh_every=100)
    b = data(1, device)[0]
    run = captured.capture(b, label_words(WORDS))
    for _ in range(2):
        run(b)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with waiting_is_an_error(device):
        for _ in range(5):
            run(b)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_not_captured_does_not_wait(
    device: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.import_utils as transformers_utils

    # or transformers looks into the mask
    monkeypatch.setattr(transformers_utils, "is_cuda_stream_capturing", lambda: True)
    opt, _ = twins("llama", device, rule="muon", form=form, refresh_every=100, weight_decay=0.1)
    b = data(1, device)[0]
    whole = {k: v for k, v in b.items() if k != "labels"}
    opt.step(b, label_words(WORDS))
    opt.step(whole, per_example(opt.model), whole["attention_mask"])
    with waiting_is_an_error(device):
        for _ in range(2):
            opt.step(b, label_words(WORDS))
            opt.step(whole, per_example(opt.model), whole["attention_mask"])
    assert opt.steps == 6


@on_gpu
@pytest.mark.parametrize("where", ["loss", "all"])
@pytest.mark.parametrize("form", ["core", "right"])
def test_a_wide_model_in_bf16(device: str, form: str, where: str) -> None:
    """Widths at which the native kernels and cuBLAS choose as they do for large models."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512, hidden_size=1024, ffn_dim=4096, num_hidden_layers=4,
        num_attention_heads=8, word_embed_proj_dim=1024, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    models = [OPTForCausalLM(config).to(device, torch.bfloat16).eval()]
    models.append(OPTForCausalLM(config).to(device, torch.bfloat16).eval())
    models[1].load_state_dict(models[0].state_dict())
    opts = []
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(("layers.2." in name or "layers.3." in name) and "fc2.w" in name)
        opts.append(
            SubZero(
                model, **{**OPTIONS, "form": form, "where": where, "rank": 64, "rule": "muon",
                          "eps": 3e-2, "queries": 8},
            )
        )  # fmt: skip
    step, captured = opts
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(5):
        ids = torch.randint(0, 512, (16, 128), generator=generator).to(device)
        batches.append({"input_ids": ids, "labels": ids[:, 0] % 2})
    equal_steps(step, captured, batches, [label_words(WORDS)] * 2, device)
    assert captured.skipped == 0
