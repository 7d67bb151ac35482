"""The output head: run on what a loss reads, a few positions at a time, and on no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, build

from subzero import LogitsLoss, SubZero, heads, label_logits, label_words, next_token


def head_outputs(model):
    """Shapes of what the head forms from now on."""
    shapes = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: shapes.append(tuple(out.shape))
    )
    return shapes


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma", "gemma2", "qwen3", "phi"])
@pytest.mark.parametrize("attached", [False, True])
def test_language_model_losses_are_formed_a_few_positions_at_a_time(name, attached, monkeypatch):
    """The same losses as from all logits at once, of which there are never so many."""
    model = build(name).double()
    if attached:
        opt = SubZero(model, rank=4, eps=1e-1, lr=1e-1)
        opt.step(without_padding(batch(3, 9)), next_token())
    given = without_padding(batch(4, 9))
    logits = model(**given).logits[:, :-1].detach()
    want = F.cross_entropy(logits.transpose(1, 2), given["input_ids"][:, 1:], reduction="none")
    monkeypatch.setattr(heads, "_LOGITS", 4 * 96 * 3)
    with torch.no_grad():
        next_token()(model, given)  # finds out whether something follows the head
        shapes = head_outputs(model)
        losses = next_token()(model, given)
    chunked = name != "gemma2"  # which caps its logits
    assert [s[1] for s in shapes if s[1]] == ([3, 3, 2] if chunked else [8])
    assert torch.allclose(losses, want, rtol=0, atol=1e-9)


def without_padding(batch):
    return {"input_ids": batch["input_ids"]}  # a window of 3 sees nothing else in padding


@pytest.mark.parametrize("name", ["llama", "llama untied", "opt", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_trained_head_forms_the_words_only_for_every_group(name, dtype):
    """And the losses are those of the head run whole, sign by sign."""
    found = []
    for whole in (False, True):
        model = build(name, dtype=dtype)
        given = {**without_padding(batch(3, 6)), "labels": torch.tensor([0, 1, 1])}
        objective = label_words([5, 9])
        if whole:
            objective = LogitsLoss(
                lambda logits, b: F.cross_entropy(
                    logits[:, 0, [5, 9]].to(torch.promote_types(logits.dtype, torch.float32)),
                    b["labels"],
                    reduction="none",
                ),
                objective.positions,
                width=1,
            )
        lr = 1e-1 if dtype == torch.float64 else 1e-6
        opt = SubZero(model, rank=4, eps=1e-1, lr=lr, queries=2)
        shapes = head_outputs(model)
        found.append(torch.stack([opt.step(given, objective) for _ in range(3)]))
        assert {s[-1] for s in shapes} == ({96} if whole else {2})
        assert not opt.plan().one_by_one
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    assert torch.allclose(*found, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ["words", "labels"])
def test_label_logits_are_the_models_own_where_the_labels_are(name, kind):
    model, given, words = build(name, dtype=torch.bfloat16), batch(3, 9), [5, 9, 30]
    with torch.no_grad():
        whole = model(**given).logits.float()
        shapes = head_outputs(model)
        if kind == "words":
            logits = label_logits(model, {**given, "labels": torch.tensor([0, 1, 2])}, words)
            want = whole[:, -1:, words]
        else:
            labels = torch.full_like(given["input_ids"], -100)
            labels[:, -2:] = given["input_ids"][:, -2:]
            logits = label_logits(model, {**given, "labels": labels})
            want = whole[:, -3:-1]
    assert shapes == [want.shape]
    assert logits.dtype == torch.float32 and logits.shape == want.shape
    torch.testing.assert_close(logits, want, rtol=2e-2, atol=1e-2)


def test_a_model_that_adds_to_its_logits_needs_them_whole():
    """As BART does: what it adds has the vocabulary's width."""
    model, given = build("llama"), batch(2, 5)
    plain, shift = model.forward, torch.randn(1, 96)

    def forward(input_ids, attention_mask=None, use_cache=None):
        out = plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        out.logits = out.logits + shift
        return out

    model.forward = forward
    with torch.no_grad():
        losses = next_token()(model, given)
        logits = model(**given).logits[:, :-1]
    want = F.cross_entropy(logits.transpose(1, 2), given["input_ids"][:, 1:], reduction="none")
    assert torch.equal(losses[1], want[1])
