"""Scores of a split against plain forwards, one example at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_task import llama, sentences, tokenizer

from subzero.batches import Encoder
from subzero.evaluation import Scores, calibrated_accuracy, evaluate
from subzero.objectives import label_words, next_token
from subzero.tasks import Example, make_task, word_ids

EXAMPLES = [Example(f"{text} It was", label) for text, label in sentences()]


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module")
def model(tok):
    return llama(len(tok))


@torch.no_grad()
def alone(model, tok, example):
    ids = torch.tensor(tok(example.prompt, add_special_tokens=False)["input_ids"])
    return ids, model(input_ids=ids[None], use_cache=False).logits[0]


def test_label_words_are_scored_by_example(model, tok):
    words = word_ids(make_task("movie-reviews"), tok)
    scores = evaluate(model, label_words(words), Encoder(tok, model), EXAMPLES)
    logits = torch.stack([alone(model, tok, e)[1][-1, words] for e in EXAMPLES])
    labels = torch.tensor([e.label for e in EXAMPLES])
    assert torch.allclose(scores.logits, logits, atol=1e-5)
    assert abs(scores.loss - F.cross_entropy(logits, labels)) < 1e-5
    assert scores.accuracy == (logits.argmax(1) == labels).double().mean()


def test_language_modelling_is_scored_by_token(model, tok):
    """Examples of differing length: the mean over tokens is not the mean of their means."""
    long = [Example(" and ".join([e.prompt] * 4)) for e in EXAMPLES[:20:2]]
    examples = long + [Example(e.prompt) for e in EXAMPLES[1:40:3]]
    losses = []
    for example in examples:
        ids, logits = alone(model, tok, example)
        losses.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    by_token = float(torch.cat(losses).mean())
    by_example = float(torch.stack([part.mean() for part in losses]).mean())
    assert abs(by_token - by_example) > 1e-3
    scores = evaluate(model, next_token(), Encoder(tok, model), examples)
    assert scores.loss == pytest.approx(by_token, abs=1e-5)
    assert scores.accuracy is None and scores.summary() == {"loss": scores.loss}


def test_better_is_more_accurate_then_a_lower_loss():
    best = Scores(0.5, 0.8)
    assert Scores(0.9, 0.81).better_than(best) and not Scores(0.1, 0.79).better_than(best)
    assert Scores(0.4, 0.8).better_than(best) and not Scores(0.6, 0.8).better_than(best)
    assert Scores(0.4).better_than(Scores(0.5)) and not Scores(0.5).better_than(Scores(0.5))


def test_calibration_takes_a_constant_preference_away():
    labels = [0, 1] * 50
    margin = torch.tensor([1.0 if label else -1.0 for label in labels]) + torch.linspace(
        -0.5, 0.5, 100
    )
    logits = torch.stack([-margin / 2 + 40, margin / 2], 1)
    examples = [Example("", label) for label in labels]
    assert (logits.argmax(1) == torch.tensor(labels)).float().mean() == 0.5
    assert calibrated_accuracy(logits, examples) >= 0.99
