"""A whole run on a tiny model: what it writes is what it measured, and what it chose on dev."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_task import save_model, save_rows, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from subzero.batches import Encoder
from subzero.data import load_examples, split_examples
from subzero.errors import CommandError
from subzero.evaluation import Scores, evaluate
from subzero.methods import make_method
from subzero.models import choose_trained, load_model
from subzero.objectives import label_words
from subzero.settings import METHODS, Settings, fill
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
        refresh_every=10,
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
    assert Settings(**run["settings"]) == fill(settings, "activation", True)
    assert run["versions"]["torch"] and run["settings"]["method"] == metrics["method"]
    assert (folder / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_the_same_seed_gives_the_same_run(settings, metrics, tmp_path):
    short = replace(settings, steps=3, output=str(tmp_path / "a"))
    first = train(short, "", CONSOLE)
    again = train(replace(short, output=str(tmp_path / "b")), "", CONSOLE)
    other = train(replace(short, output=str(tmp_path / "c"), seed=1), "", CONSOLE)
    assert first["train_loss"] == again["train_loss"] != other["train_loss"]
    assert first["test"] == again["test"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_keeps_the_best(settings, tmp_path, method):
    change = {
        "activation": {},
        "weight": dict(queries=16),
        "mezo": dict(lr=3e-4, rank=None, refresh_every=None, steps=150, eval_every=50),
        "adamw": dict(lr=1e-3, rank=None, refresh_every=None),
    }[method]
    run = replace(settings, method=method, output=str(tmp_path / "out"), **change)
    metrics = train(run, "", CONSOLE)
    assert metrics["method"] == method and metrics["skipped_steps"] == 0
    assert metrics["best"]["loss"] < metrics["dev"][0]["loss"] - 0.05
    loss, accuracy = plain_scores(run.output, examples_of(settings)["dev"])
    assert loss == pytest.approx(metrics["best"]["loss"], rel=1e-4)
    assert accuracy == pytest.approx(metrics["best"]["accuracy"])
    assert metrics["forwards"] > 0 and metrics["batch_size"] == 16
    seconds = metrics["seconds"]
    assert 0 < seconds["steps"] < seconds["training"] < seconds["total"]


def test_the_report_names_method_forwards_and_seconds(settings, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    run = replace(
        settings, method="adamw", rank=None, refresh_every=None, lr=1e-3, steps=2,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    train(run, "", console)
    text = console.export_text()
    assert "method   AdamW, with backpropagation (--method adamw)" in text
    assert "AdamW, with backpropagation: 2 steps" in text
    assert "\n6 forwards of 16 examples in 0:0" in text and " min with evaluations" in text


@pytest.mark.parametrize("method", METHODS)
def test_restore_brings_back_the_best_weights_whatever_came_after(settings, method):
    loaded = load_model(settings.model, device="cpu")
    model = loaded.model
    choose_trained(model, "all")
    change = dict(lr=0.05, eps=1e-3) if method == "mezo" else dict(lr=0.05)
    if method in ("activation", "weight"):
        change |= dict(rank=4, refresh_every=2)
    asked = Settings(model="", output="", method=method, **change)
    made = make_method(fill(asked, method, True), model)
    words = word_ids(make_task("movie-reviews", "{x}"), loaded.tokenizer)
    objective, encoder = label_words(words), Encoder(loaded.tokenizer, model)
    dev = examples_of(settings)["dev"]
    batch = encoder.collate(encoder.encode(dev), [e.label for e in dev])
    best = _Best(model, made)
    for step in range(5):
        made.step(batch, objective)
        if step == 1:
            kept = evaluate(model, objective, encoder, dev)
            assert best.offer(step, kept)
    worse = Scores(kept.loss + 1, kept.accuracy)
    assert not best.offer(9, worse)
    assert abs(evaluate(model, objective, encoder, dev).loss - kept.loss) > 1e-4
    best.restore()
    made.detach()
    assert abs(evaluate(model, objective, encoder, dev).loss - kept.loss) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_language_modelling(settings, tmp_path, method):
    change = {"mezo": dict(lr=1e-4), "adamw": dict(lr=1e-3)}.get(method, {})
    if change:
        change |= dict(rank=None, refresh_every=None)
    text = replace(
        settings, method=method, task="text", steps=12, eval_every=6, output=str(tmp_path / "lm"),
        **change,
    )  # fmt: skip
    metrics = train(text, "", CONSOLE)
    assert metrics["best"]["loss"] < metrics["dev"][0]["loss"]
    assert "accuracy" not in metrics["test"]["after"]


def test_texts_of_a_single_token_are_left_out(settings, tmp_path):
    rows = ["text", *(text for text, _ in sentences()), "a", "b", "c"]
    data = tmp_path / "rows.tsv"
    data.write_text("\n".join(rows) + "\n")
    text = replace(
        settings, task="text", data=str(data), steps=1, train_examples=200, dev_examples=20,
        output=str(tmp_path / "lm"),
    )  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    train(text, "", console)
    assert "(3 of a single token left out)" in console.export_text()
    data.write_text("text\n" + "\n".join("abcdefghijklmnop") + "\n")
    few = replace(text, overwrite=True, train_examples=4, dev_examples=4, test_examples=4)
    with pytest.raises(CommandError, match="texts of at least two tokens, got none for test"):
        train(few, "", CONSOLE)


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
