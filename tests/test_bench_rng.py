"""benchmarks/bench_rng.py works from end to end, on tiny tensors and the CPU."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from scripts import script

from subzero_kernels import backends, ops

ON_CPU = ["--device", "cpu", "--tiny", "--no-compile", "--repeats", "1", "--backend", "reference"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv(backends.VARIABLE, "auto")
    with script(monkeypatch, "bench_rng") as module:
        yield module


def test_every_case_is_checked_timed_and_written(bench, tmp_path, capsys, monkeypatch):
    path, asked, choose = tmp_path / "rng.csv", set(), backends.choose

    def noted(op, device, float64=False, kind=""):
        asked.add((op, kind))
        return choose(op, device, float64, kind)

    monkeypatch.setattr(ops, "choose", noted)
    bench.main([*ON_CPU, "--output", str(path)])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["contestant"] == "reference"]
    assert {row["op"] for row in ours} == set(bench.WORK)
    assert all(0 <= float(row["error"]) <= 1 and float(row["us"]) > 0 for row in ours)
    assert {row["contestant"] for row in rows} == {"reference", "eager", "add_", "normal_"}
    # A row bears the kind by which its op chooses the backend.
    assert {(row["op"], row["kind"]) for row in ours} <= asked
    assert "WRONG" not in capsys.readouterr().out


def test_a_wrong_backend_is_not_timed(bench, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rng.csv"
    monkeypatch.setattr(bench.WORK["add_noise_"], "ours", lambda work: work.y.add_(1.0))
    bench.main([*ON_CPU, "--op", "add_noise_", "--output", str(path)])
    assert capsys.readouterr().out.count("WRONG") == 9
    assert not path.exists()


def test_a_case_that_fails_stops_no_other(bench, tmp_path, capsys, monkeypatch):
    def full(case, device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(bench.WORK, "perturb_dense_", full)
    path = tmp_path / "rng.csv"
    bench.main([*ON_CPU, "--output", str(path)])
    with open(path, newline="") as file:
        assert {row["op"] for row in csv.DictReader(file)} == set(bench.WORK) - {"perturb_dense_"}
    assert capsys.readouterr().out.count("FAILED, OutOfMemoryError: no room") == 3


def test_what_has_a_target_comes_first_and_is_all_that_quick_measures(bench):
    found = bench.cases(bench.parse(["--device", "cpu"]))
    quick = bench.cases(bench.parse(["--device", "cpu", "--quick"]))
    assert found[: len(quick)] == quick and len(found) > len(quick)
    measured = [(case.op, case.what) for case in quick if case.dtype == "fp32"]
    assert measured == [
        ("perturb_dense_", "OPT-13B"),
        ("add_noise_", "all rows"),
        ("add_noise_", "those alone"),
        ("add_noise_", "every 32nd"),
        ("noise_outer_", "all rows"),
    ]
    assert not any(map(bench.has_target, found[len(quick) :]))


def test_a_model_that_does_not_fit_is_cut_and_named_so(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "memory_for_weights", lambda device: bench.TINY.numel * 4 - 1)
    path = tmp_path / "rng.csv"
    bench.main([*ON_CPU, "--op", "perturb_dense_", "--output", str(path)])
    with open(path, newline="") as file:
        found = {(row["what"], row["dtype"]) for row in csv.DictReader(file)}
    assert found == {("tiny", "bf16"), ("tiny", "fp16"), ("tiny, 1 of 2 layers", "fp32")}


def test_profiling_without_ncu_says_so(bench, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--profile", "normal_", "--output", "unused.csv"])
    assert stopped.value.code == 1 and "ncu is missing" in capsys.readouterr().out
