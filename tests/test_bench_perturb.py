"""benchmarks/bench_perturb.py works from end to end, on tiny weights and the CPU."""

from __future__ import annotations

import csv
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import script

from subzero_kernels import backends

ON_CPU = ["--device", "cpu", "--no-compile", "--repeats", "1", "--ceiling-bytes", "4096"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with models that fit here."""
    monkeypatch.setenv(backends.VARIABLE, "auto")
    with script(monkeypatch, "bench_perturb") as module:
        shapes = importlib.import_module("model_shapes")
        tiny = shapes.Model(2, [(96, 64), (33, 70), (5,)], [(1, 40)])
        monkeypatch.setattr(module, "MODELS", {"tiny": tiny})
        monkeypatch.setattr(module, "RANKS", {"tiny": 8})
        monkeypatch.setattr(module, "opt_13b_lora", lambda: [(4, 32), (32, 4)])
        monkeypatch.setattr(module, "SHAPES", [(64, 48), (31, 7)])
        monkeypatch.setattr(module, "SHAPE_RANKS", [4, 8])
        yield module


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_case_is_checked_timed_and_written(bench, tmp_path, capsys):
    path = tmp_path / "perturb.csv"
    bench.main([*ON_CPU, "--backend", "reference", "--output", str(path)])
    rows = table(path)
    ours = [row for row in rows if row["contestant"] == "reference"]
    assert {(row["op"], row["what"]) for row in ours} == {
        ("perturb_many_", "tiny"),
        ("fold_", "tiny"),
        ("perturb_many_", bench.LORA),
        ("perturb_", "64x48"),
        ("perturb_", "31x7"),
    }
    assert {row["dtype"] for row in ours} == {"bf16", "fp16", "fp32"}
    assert {row["contestant"] for row in rows} == {"reference", "eager", "addmm_", "add_"}
    assert all(float(row["us"]) > 0 and float(row["x_eager"]) > 0 for row in rows)
    assert all(float(row["error"]) <= 1 and float(row["host_us"]) > 0 for row in ours)
    kinds = {(row["op"], row["what"], row["kind"]) for row in ours if row["dtype"] == "bf16"}
    assert ("perturb_", "64x48", "bfloat16 small rank 16") in kinds
    assert ("fold_", "tiny", "bfloat16 small rank 16") in kinds
    shown = capsys.readouterr().out
    assert shown.count("reference") > len(ours) and "target 60 us" in shown


@pytest.mark.parametrize("op", ["perturb_many_", "fold_"])
@pytest.mark.parametrize("fault", ["wrong", "failing"])
def test_a_backend_that_is_wrong_or_fails_is_named_and_not_timed(
    bench, tmp_path, capsys, monkeypatch, op, fault
):
    reference = backends.load("reference")[0]
    sound = getattr(reference, op)

    def broken(*args, **kwargs) -> None:
        if fault == "failing":
            raise RuntimeError("no such kernel")
        sound(*args, **kwargs)
        weights = args[0] if isinstance(args[0], list) else [args[0]]
        weights[0].view(-1)[-1] += 0.01  # one element of one matrix

    monkeypatch.setattr(reference, op, broken)
    backends._choose.cache_clear()
    path = tmp_path / "perturb.csv"
    bench.main([*ON_CPU, "--backend", "reference", "--model", "tiny", "--output", str(path)])
    backends._choose.cache_clear()
    assert {row["op"] for row in table(path) if row["contestant"] == "reference"} == {
        "fold_" if op == "perturb_many_" else "perturb_many_"
    }
    shown = capsys.readouterr().out
    assert shown.count("WRONG" if fault == "wrong" else "FAILED") == 3


def test_a_case_that_fails_stops_no_other(bench, tmp_path, capsys, monkeypatch):
    """Neither one whose weights cannot be made nor one whose measurement fails."""
    sound = bench.Weights

    def full(case, device):
        if case.what == "tiny" and case.dtype == "fp32":
            raise torch.OutOfMemoryError("no room")
        return sound(case, device)

    def failing(weights):
        raise RuntimeError("no such line")

    monkeypatch.setattr(bench, "Weights", full)
    monkeypatch.setattr(sound, "line", lambda weights, name: lambda: failing(weights))
    path = tmp_path / "perturb.csv"
    bench.main([*ON_CPU, "--backend", "reference", "--output", str(path)])
    rows = table(path)
    assert {row["contestant"] for row in rows} == {"reference", "add_"}  # the lines failed
    assert {row["dtype"] for row in rows if row["what"] == "tiny"} == {"bf16", "fp16"}
    assert {row["what"] for row in rows} == {"tiny", bench.LORA, "64x48", "31x7"}
    shown = capsys.readouterr().out
    assert shown.count("no room") == 1 and "eager: FAILED, RuntimeError: no such line" in shown


def test_what_has_a_target_comes_first(bench, monkeypatch):
    monkeypatch.undo()
    options = bench.parse(["--device", "cpu"])
    found = bench.cases(options)
    first = [bench.has_target(case) for case in found]
    # Between those with a target are only cases on the very weights of one of them.
    keys = {bench.weights_key(case) for case, has in zip(found, first, strict=True) if has}
    last = len(first) - first[::-1].index(True)
    assert len(keys) == 15 and {bench.weights_key(case) for case in found[:last]} == keys
    assert bench.weights_key(found[-1]) not in keys
    groups = [key for key, _ in itertools.groupby(found, bench.weights_key)]
    assert len(groups) == len(set(groups))  # no weights are made twice
    quick = bench.cases(bench.parse(["--device", "cpu", "--quick"]))
    assert len(quick) == 17 and all(map(bench.has_target, quick))


def test_a_model_that_does_not_fit_is_cut_and_says_so(bench, tmp_path, capsys, monkeypatch):
    tiny = bench.MODELS["tiny"]
    monkeypatch.setattr(bench, "memory_for_weights", lambda device: tiny.numel * 4 - 1)
    monkeypatch.setitem(bench.TARGETS, ("perturb_many_", "tiny", 8), (0.5, 0.5))
    path = tmp_path / "perturb.csv"
    bench.main([*ON_CPU, "--backend", "reference", "--model", "tiny", "--output", str(path)])
    found = {(row["what"], row["dtype"], row["matrices"]) for row in table(path)}
    assert found == {
        ("tiny", "bf16", "5"),
        ("tiny", "fp16", "5"),
        ("tiny, 1 of 2 layers", "fp32", "3"),
    }
    lines = capsys.readouterr().out.splitlines()
    assert any("1 of 2 layers" in line and "target 0.50" in line for line in lines)


def test_models_are_cut_to_the_last_layer_that_fits(bench):
    import model_shapes

    model = model_shapes.MODELS["OPT-13B"]
    assert len(model.matrices) == 242 and model.numel == 12_853_473_280
    whole = model.numel * 4
    assert model_shapes.fitted("OPT-13B", model, 4, whole) == ("OPT-13B", model)
    assert model_shapes.fitted("OPT-13B", model, 4, None) == ("OPT-13B", model)
    what, less = model_shapes.fitted("OPT-13B", model, 4, whole - 1)
    assert what == "OPT-13B, 39 of 40 layers" and less.layers == 39
    assert model_shapes.whole(what) == model_shapes.whole("OPT-13B") == "OPT-13B"
    with pytest.raises(ValueError, match="one layer"):
        model_shapes.fitted("OPT-13B", model, 4, 1 << 30)


@pytest.mark.parametrize(
    ("megabytes", "count"), [(48_000, 1), (200, 1), (199, 3), (50, 5), (1, 201), (0, 512)]
)
def test_only_small_buffers_are_rotated(bench, megabytes, count):
    """Of a cache of 50 MB: none is found in it again, and a model's weights are made once."""
    import gpu_bench

    assert gpu_bench.copies_past(50 * 10**6, megabytes * 10**6) == count


def test_the_plot_is_made_from_the_csv(bench, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "perturb.csv"
    row = dict(op="perturb_", what="5120x5120", gpu="a GPU", add_tb_s="4.1", rank="64")
    rows = [
        {**row, "dtype": dtype, "contestant": name, "of_add": "0.9", "rank": rank, **case}
        for dtype in ("bf16", "fp32")
        for name in ("cuda", "triton", "addmm_", "add_")
        for rank in ("24", "64")
        for case in ({}, {"op": "fold_", "what": "OPT-13B"})
    ]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    bench.main(["--plot", "--output", str(path)])
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_profiling_says_when_ncu_is_missing(bench, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as left:
        bench.main(["--profile", "--shape", "64x48"])
    assert left.value.code == 1 and "ncu is missing" in capsys.readouterr().out
