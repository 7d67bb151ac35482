"""A whole run on a tiny model: what it writes is what it measured, and what it chose on dev."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_task import save_model, save_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from subzero.batches import Encoder
from subzero.data import load_examples, split_examples
from subzero.errors import CommandError
from subzero.evaluation import Scores, evaluate
from subzero.models import choose_trained, load_model
from subzero.objectives import LabelWords
from subzero.optimizer import SubZero
from subzero.settings import Settings
from subzero.tasks import make_task, word_ids
from subzero.trainer import _Best, schedule, train

CONSOLE = Console(quiet=True)
SPLIT = (64, 24, 40)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Settings(
        model=str(save_model(folder / "model")),
        output=str(folder / "out"),
        task="movie-reviews",
        template="{x}",
        data=str(save_rows(folder / "rows.tsv")),
        train_examples=SPLIT[0],
        dev_examples=SPLIT[1],
        test_examples=SPLIT[2],
        device="cpu",
        steps=40,
        eval_every=8,
        batch_size=16,
        train_layers="all",
        lr=3e-2,
        rank=8,
        queries=16,
    )


@pytest.fixture(scope="module")
def metrics(settings):
    return train(settings, "subzero train it", CONSOLE)


def plain_scores(folder, examples):
    """Loss and accuracy by plain transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    words = tok.convert_tokens_to_ids(["Ġterrible", "Ġgreat"])
    losses, right = [], 0
    for e in examples:
        with torch.no_grad():
            logits = model(**tok(e.prompt, return_tensors="pt")).logits[0, -1, words]
        losses.append(float(-logits.log_softmax(0)[e.label]))
        right += int(logits.argmax()) == e.label
    return sum(losses) / len(losses), right / len(losses)


def examples_of(settings):
    rows = load_examples(make_task("movie-reviews", "{x}"), settings.data)
    return split_examples(rows, *SPLIT, settings.split_seed)[0]


def test_it_learns(metrics):
    assert metrics["test"]["after"]["accuracy"] >= 0.8 > metrics["test"]["before"]["accuracy"]


def test_saved_model_in_plain_transformers_scores_as_reported(settings, metrics):
    splits = examples_of(settings)
    for folder, reported in (
        (settings.model, metrics["test"]["before"]),
        (settings.output, metrics["test"]["after"]),
    ):
        loss, accuracy = plain_scores(folder, splits["test"])
        assert loss == pytest.approx(reported["loss"], rel=1e-4)
        assert accuracy == pytest.approx(reported["accuracy"])
    loss, accuracy = plain_scores(settings.output, splits["dev"])
    assert loss == pytest.approx(metrics["best"]["loss"], rel=1e-4)
    assert accuracy == pytest.approx(metrics["best"]["accuracy"])


def test_best_is_the_best_on_dev(metrics):
    assert [d["step"] for d in metrics["dev"]] == [0, 8, 16, 24, 32, 40]
    best = max(metrics["dev"], key=lambda d: (d["accuracy"], -d["loss"]))
    assert metrics["best"] == best


def test_files_of_the_folder(settings, metrics):
    folder = Path(settings.output)
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.json"} <= names
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (folder / "command.txt").read_text() == "subzero train it\n"
    run = json.loads((folder / "run.json").read_text())
    assert Settings(**run["settings"]) == settings and run["versions"]["torch"]
    assert (folder / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_the_same_seed_gives_the_same_run(settings, metrics, tmp_path):
    short = replace(settings, steps=3, output=str(tmp_path / "a"))
    first = train(short, "", CONSOLE)
    again = train(replace(short, output=str(tmp_path / "b")), "", CONSOLE)
    other = train(replace(short, output=str(tmp_path / "c"), seed=1), "", CONSOLE)
    assert first["train_loss"] == again["train_loss"] != other["train_loss"]
    assert first["test"] == again["test"]


def test_restore_brings_back_the_best_weights_whatever_came_after(settings):
    loaded = load_model(settings.model, device="cpu")
    model = loaded.model
    choose_trained(model, "all", norms=True)
    optimizer = SubZero(model, lr=0.1, rank=4, refresh_every=2)
    words = word_ids(make_task("movie-reviews", "{x}"), loaded.tokenizer)
    objective, encoder = LabelWords(model, words), Encoder(loaded.tokenizer, model)
    dev = examples_of(settings)["dev"]
    batch = encoder.collate(encoder.encode(dev), [e.label for e in dev])
    best = _Best(model, optimizer)
    for step in range(5):
        optimizer.step(batch, objective)
        if step == 1:
            kept = evaluate(objective, encoder, dev)
            assert best.offer(step, kept)
    worse = Scores(kept.loss + 1, kept.accuracy)
    assert not best.offer(9, worse)
    assert abs(evaluate(objective, encoder, dev).loss - kept.loss) > 1e-4
    best.restore()
    optimizer.detach()
    assert abs(evaluate(objective, encoder, dev).loss - kept.loss) < 1e-6


def test_language_modelling(settings, tmp_path):
    text = replace(
        settings, task="text", steps=6, eval_every=6, output=str(tmp_path / "lm"), lr=1e-2
    )
    metrics = train(text, "", CONSOLE)
    assert metrics["best"]["loss"] < metrics["dev"][0]["loss"]
    assert "accuracy" not in metrics["test"]["after"]


def test_a_loss_that_is_never_finite_writes_nothing(settings, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(settings.model)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(tmp_path / "nan")
    broken = replace(settings, model=str(tmp_path / "nan"), output=str(tmp_path / "out"), steps=2)
    with pytest.raises(CommandError, match="not finite in any step"):
        train(broken, "", CONSOLE)
    assert not (tmp_path / "out").exists()


def test_time_limit_stops_early_and_still_saves(settings, tmp_path):
    limited = replace(settings, steps=1000, max_minutes=1e-4, output=str(tmp_path / "out"))
    assert train(limited, "", CONSOLE)["steps"] == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "first", "middle", "last"),
    [("cosine", 1, 0.5, 0), ("linear", 1, 0.5, 0), ("constant", 1, 1, 1)],
)
def test_schedules(name, first, middle, last):
    factor = schedule(name, 10)
    assert [factor(0), factor(5), factor(10)] == pytest.approx([first, middle, last])
