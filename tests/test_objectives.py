"""Objectives and batches: each loss against one unpadded forward per example, in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_task import llama, sentences, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from subzero.batches import Encoder, TrainBatches
from subzero.evaluation import calibrated_accuracy, evaluate
from subzero.objectives import LabelWords, NextToken
from subzero.tasks import Example, make_task, word_ids

TASK = make_task("movie-reviews")


def gpt2(vocab):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def opt(vocab):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module", params=[llama, gpt2, opt])
def model(request, tok):
    return request.param(len(tok)).double()


@pytest.fixture
def examples():
    return [Example(f"{text} It was", label) for text, label in sentences()[::11]]


def alone(model, tok, example):
    """Logits (tokens, vocabulary) of one example without padding, mask or position ids."""
    ids = torch.tensor([tok(example.prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return ids[0], model(input_ids=ids, use_cache=False).logits[0]


def flipped(batch):
    """The same batch, padded on the right."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = [torch.cat([i[m == 1], i[m == 0]]) for i, m in zip(ids, mask, strict=True)]
    right = {**batch, "input_ids": torch.stack(rows), "attention_mask": mask.flip(1)}
    right.pop("position_ids", None)
    return right


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_words_are_the_losses_of_each_example_alone(model, tok, examples, side):
    words = word_ids(TASK, tok)
    batch = Encoder(tok, model).collate(
        Encoder(tok, model).encode(examples), [e.label for e in examples]
    )
    assert 0 < batch["attention_mask"].float().mean() < 1
    objective = LabelWords(model, words, side)
    with torch.no_grad():
        losses = objective(batch if side == "left" else flipped(batch))
    assert losses.dtype == torch.float32 and losses.shape == (len(examples),)
    for loss, example in zip(losses, examples, strict=True):
        logits = alone(model, tok, example)[1][-1, words]
        assert abs(loss + logits.log_softmax(0)[example.label]) < 2e-6


def test_next_token_losses_are_those_of_each_example_alone(model, tok, examples):
    encoder = Encoder(tok, model)
    batch = encoder.collate(encoder.encode(examples), [-1] * len(examples))
    with torch.no_grad():
        left, right = NextToken(model)(batch), NextToken(model)(flipped(batch))
    assert left.dtype == torch.float32
    for i, example in enumerate(examples):
        ids, logits = alone(model, tok, example)
        scores = logits[:-1].log_softmax(1)
        want = -scores[torch.arange(len(ids) - 1), ids[1:]].mean()
        assert abs(left[i] - want) < 3e-6 * want and abs(right[i] - want) < 3e-6 * want


def test_head_is_read_at_one_position_and_through_its_module(tok, examples):
    """The head may be trained and perturbed, so it must be called, on (examples, 1, width)."""
    model = llama(len(tok))
    shapes = []
    model.lm_head.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    encoder = Encoder(tok, model)
    batch = encoder.collate(encoder.encode(examples), [e.label for e in examples])
    LabelWords(model, word_ids(TASK, tok))(batch)
    assert shapes == [(len(examples), 1, 32)]


def test_unknown_padding_side(tok):
    with pytest.raises(ValueError, match='padding_side: expected "left" or "right"'):
        LabelWords(llama(len(tok)), [1, 2], "middle")


def test_special_tokens_stay_in_front_and_long_prompts_keep_their_end():
    tok = tokenizer(bos=True)
    encoder = Encoder(tok, llama(len(tok)), max_tokens=5)
    (ids,) = encoder.encode([Example("the film is very good It was")])
    assert len(ids) == 5 and ids[0] == tok.bos_token_id and tok.eos_token_id not in ids
    assert tok.decode(ids[1:]).endswith("It was")


def test_evaluation_batches_cover_every_example_once_within_the_budget(tok):
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    encoder = Encoder(tok, llama(len(tok)))
    seen = []
    for rows, batch in encoder.sorted_batches(examples, tokens=100):
        seen += rows
        assert batch["input_ids"].numel() <= 100
        assert batch["labels"].tolist() == [examples[i].label for i in rows]
    assert sorted(seen) == list(range(len(examples)))


def test_training_batches_are_drawn_by_seed_once_an_epoch(tok):
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    encoder = Encoder(tok, llama(len(tok)))

    def epochs(seed):
        stream = iter(TrainBatches(encoder, examples, 16, seed))
        return [next(stream)["input_ids"] for _ in range(16)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    texts = [tok.decode(row, skip_special_tokens=True) for batch in first[:8] for row in batch]
    assert sorted(texts) == sorted(e.prompt for e in examples)


def test_evaluate_and_calibration(tok):
    model = llama(len(tok))
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    words = word_ids(TASK, tok)
    scores = evaluate(LabelWords(model, words), Encoder(tok, model), examples)
    logits = torch.stack([alone(model, tok, e)[1][-1, words] for e in examples])
    labels = torch.tensor([e.label for e in examples])
    assert abs(scores.loss - torch.nn.functional.cross_entropy(logits, labels)) < 1e-5
    assert scores.accuracy == (logits.argmax(1) == labels).double().mean()


def test_calibration_takes_a_constant_preference_away():
    labels = [0, 1] * 50
    margin = torch.tensor([1.0 if label else -1.0 for label in labels]) + torch.linspace(
        -0.5, 0.5, 100
    )
    logits = torch.stack([-margin / 2 + 40, margin / 2], 1)
    examples = [Example("", label) for label in labels]
    assert (logits.argmax(1) == torch.tensor(labels)).float().mean() == 0.5
    assert calibrated_accuracy(logits, examples) >= 0.99
