"""benchmarks/bench_linear.py works from end to end, on a tiny model and the CPU."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_linear
    from model_shapes import Model

    tiny = Model(1, [(160, 96), (160, 96), (96, 160), (96,)], [])
    monkeypatch.setitem(bench_linear.MODELS, "OPT-1.3B", tiny)
    yield bench_linear
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


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
