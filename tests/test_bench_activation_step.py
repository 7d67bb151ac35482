"""benchmarks/bench_activation_step.py works from end to end, on tiny models and the CPU."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers as tf
from scripts import script

SIZE = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with models that fit here."""
    tiny = {
        "OPT-13B": tf.OPTConfig(**SIZE, ffn_dim=128, word_embed_proj_dim=64),
        "Llama-3-8B": tf.LlamaConfig(**SIZE, intermediate_size=96, num_key_value_heads=2),
    }
    with script(monkeypatch, "bench_activation_step") as module, torch.no_grad():
        monkeypatch.setattr(module, "CONFIGS", tiny)
        yield module


def arguments(path: Path, *more: str) -> list[str]:
    return [
        "--device", "cpu", "--tokens", "3x8", "--queries", "4", "--repeats", "1", "--least-ms",
        "0", "--dtype", "fp32", "--output", str(path), *more,
    ]  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_case_is_checked_timed_and_written(bench, tmp_path, capsys):
    path = tmp_path / "step.csv"
    models = ["--model", "OPT-13B", "Llama-3-8B", "--where", "loss", "all"]
    bench.run(bench.parse(arguments(path, *models)))
    rows, shown = table(path), capsys.readouterr().out
    assert "FAILED" not in shown and "DIFFERS" not in shown and "CHANGED" not in shown
    for model in ("OPT-13B", "Llama-3-8B"):
        for where in ("loss", "all"):
            for form in ("right", "core"):
                label = f"{model} {where} 3x8 K=4 {form}"
                assert f"{label}: captured equals uncaptured" in shown
                assert f"{label}: weights unchanged within the window" in shown
                queries = "a row each" if where == "loss" else "whole groups"
                assert f"{label}: queries: {queries}" in shown
                mine = [
                    (r["mode"], r["contestant"])
                    for r in rows
                    if (r["model"], r["where"], r["form"]) == (model, where, form)
                ]
                both = [(m, c) for m in ("eager", "graph") for c in ("bare", "step")]
                assert sorted(mine) == sorted(both)
    assert all(float(r["ms"]) > 0 for r in rows)
    assert all(float(r["x_bare"]) > 0 for r in rows if r["contestant"] == "step")
    assert shown.count("rows differ from whole groups by") == 2


def test_what_is_wrong_is_said(bench, tmp_path, capsys, monkeypatch):
    """A captured step that differs, weights that were written, rows that are no whole groups."""
    import subzero.capture as capture
    import subzero.row_queries as row_queries

    sound, attend = capture.CapturedStep.__call__, row_queries.attend

    def other(self, batch):
        loss = sound(self, batch) + 1
        next(iter(self._opt.model.parameters())).data.add_(1)
        return loss

    monkeypatch.setattr(capture.CapturedStep, "__call__", other)

    def wrong(module, query, key, value, *rest, **options):
        return attend(module, query, key, value * 1.01, *rest, **options)

    transformers = tf.AttentionInterface
    transformers.register(row_queries._NAME, wrong)
    monkeypatch.setattr(row_queries, "attend", wrong)
    try:
        bench.run(bench.parse(arguments(tmp_path / "s.csv", "--form", "core")))
    finally:
        monkeypatch.undo()
        transformers.register(row_queries._NAME, attend)
    shown = capsys.readouterr().out
    assert "small models: FAILED" in shown
    assert "captured DIFFERS FROM uncaptured" in shown and "weights CHANGED" in shown


def test_cases(bench):
    """Those with a target by default, every combination of what is asked otherwise."""
    every = list(bench.cases(bench.parse(["--output", "x.csv"])))
    assert len(every) == 2 * len(bench.TARGETS) and {case.key for case in every} == {*bench.TARGETS}
    asked = bench.parse(["--tokens", "4x8", "2x4", "--queries", "3", "--form", "core"])
    assert [str(case) for case in bench.cases(asked)] == [
        "OPT-13B loss 4x8 K=3 core",
        "OPT-13B loss 2x4 K=3 core",
    ]
