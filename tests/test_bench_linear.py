"""benchmarks/bench_linear.py works from end to end, on a tiny model and the CPU."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from scripts import script


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with script(monkeypatch, "bench_linear") as module:
        shapes = importlib.import_module("model_shapes")
        tiny = shapes.Model(1, [(160, 96), (160, 96), (96, 160), (96,)], [])
        monkeypatch.setitem(module.MODELS, "OPT-1.3B", tiny)
        yield module


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_each_layer_is_checked_timed_and_written(bench, tmp_path, dtype):
    path = tmp_path / "linear.csv"
    on = ["--model", "OPT-1.3B", "--rows", "64", "130", "--rank", "16", "--device", "cpu"]
    bench.main([*on, "--dtype", dtype, "--repeats", "1", "--output", str(path)])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3  # layers, rows, contestants
    assert {row["contestant"] for row in rows} == {"linear", "op", "composed"}
    ours = [row for row in rows if row["contestant"] != "linear"]
    assert all(0 <= float(row["error"]) <= 1 and float(row["us"]) > 0 for row in ours)


def test_a_wrong_op_is_not_timed(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.sk, "lowrank_linear", lambda *layer: torch.zeros(64, len(layer[1])))
    path = tmp_path / "linear.csv"
    on = ["--model", "OPT-1.3B", "--rows", "64", "--rank", "16", "--device", "cpu"]
    bench.main([*on, "--repeats", "1", "--output", str(path)])
    assert capsys.readouterr().out.count("WRONG") == 2
    with open(path, newline="") as file:
        assert "op" not in {row["contestant"] for row in csv.DictReader(file)}
