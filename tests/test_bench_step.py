"""benchmarks/bench_step.py works from end to end, on tiny models and the CPU."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers as tf
from scripts import script

ON_CPU = ["--device", "cpu", "--tokens", "3x8", "--repeats", "1", "--least-ms", "0"]
SIZE = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with models that fit here."""
    tiny = {
        "OPT-13B": tf.OPTConfig(**SIZE, ffn_dim=128, word_embed_proj_dim=64),
        "Llama-3-8B": tf.LlamaConfig(**SIZE, intermediate_size=96, num_key_value_heads=2),
    }
    with script(monkeypatch, "bench_step") as module, torch.no_grad():
        monkeypatch.setattr(module, "CONFIGS", tiny)
        yield module


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_contestant_is_checked_timed_and_written(bench, tmp_path, capsys):
    path = tmp_path / "step.csv"
    bench.run(bench.parse([*ON_CPU, "--queries", "1", "2", "--output", str(path)]))
    rows = table(path)
    shown = capsys.readouterr().out
    for model in ("OPT-13B", "Llama-3-8B"):
        for queries in "12":
            mine = [r for r in rows if (r["model"], r["queries"]) == (model, queries)]
            names = {(r["mode"], r["contestant"]) for r in mine if r["mode"] != "host"}
            expected = {("eager", c) for c in ("bare", "bare, apart", "step", "step, apart")}
            expected |= {("graph", c) for c in ("bare", "bare, apart", "step", "composed")}
            if queries == "1":
                loops = ("in place", "addmm_", "eager SubZero", "eager MeZO")
                expected |= {("eager", c) for c in loops}
            assert names == expected
            label = f"{model} 3x8 K={queries}"
            assert f"{label}: captured equals uncaptured" in shown
            assert f"{label}: weights unchanged" in shown
        host = [r for r in rows if r["model"] == model and r["mode"] == "host"]
        assert len(host) == 2 and all(float(r["host_ms"]) > 0 for r in host)
    measured = [r for r in rows if r["mode"] != "host"]
    assert all(float(r["ms"]) > 0 and int(r["tokens_per_s"]) > 0 for r in measured)
    assert all(float(r["x_bare"]) > 0 for r in measured if r["contestant"] == "step")
    assert all(float(r["faster"]) > 0 for r in measured if r["queries"] == "1")
    assert shown.count("small OPT, fp32: rho") == shown.count("small Llama, fp32: rho") == 1
    assert "FAILED" not in shown and "times as fast as eager SubZero" in shown


def test_what_is_wrong_is_said(bench, tmp_path, capsys, monkeypatch):
    """A captured step that differs, weights that were written, a rho that is another in place."""
    import subzero.capture as capture
    import subzero.weights as weights

    sound, show = capture.CapturedStep.__call__, weights.Weights.show

    def other(self, batch, positions=None):
        loss = sound(self, batch, positions)
        next(self._opt.model.parameters()).view(-1)[0] += 1
        return loss + 1

    def further(self, g):
        show(self, g)
        if self.options.apply == "in_place" and g:
            next(iter(self.plan.factored)).param.add_(0.1)

    monkeypatch.setattr(capture.CapturedStep, "__call__", other)
    monkeypatch.setattr(weights.Weights, "show", further)
    path = tmp_path / "step.csv"
    wanted = ["--model", "OPT-13B", "--queries", "1", "--quick", "--output", str(path)]
    bench.run(bench.parse([*ON_CPU, *wanted]))
    shown = capsys.readouterr().out
    assert "captured DIFFERS FROM uncaptured" in shown and "weights CHANGED" in shown
    assert "small models: FAILED, AssertionError" in shown


def test_quick_runs_what_has_a_target_and_targets_are_judged(bench, capsys, monkeypatch):
    import step_case

    monkeypatch.undo()
    quick = list(bench.cases(bench.parse(["--quick", "--output", "x"])))
    assert {case.key for case in quick} == set(bench.TARGETS)
    part = list(bench.cases(bench.parse(["--model", "OPT-13B", "--tokens", "16x32"])))
    assert [case.queries for case in part] == [1, 8]
    any_other = ["--tokens", "2x5", "--queries", "3", "--model", "OPT-1.3B"]
    assert [str(c) for c in bench.cases(bench.parse(any_other))] == ["OPT-1.3B 2x5 K=3"]
    row = dict.fromkeys(("model", "tokens", "mode", "contestant"), "x")
    for ratio, verdict in ((1.05, "met"), (1.06, "MISSED")):
        step_case.show({**row, "queries": 1, "ms": 1.0, "tokens_per_s": 1, "x_bare": ratio,
                    "target": 1.05})  # fmt: skip
        assert f"target 1.05 {verdict}" in capsys.readouterr().out


def test_the_profile_shows_kernels_of_both(bench, tmp_path, capsys):
    path = tmp_path / "step.csv"
    wanted = ["--model", "OPT-13B", "--queries", "1", "--profile", "--padded", "--no-host"]
    bench.run(bench.parse([*ON_CPU, *wanted, "--output", str(path)]))
    shown = capsys.readouterr().out
    assert "bare: times" in shown and "subzero::core_noise_" in shown
    assert {r["contestant"] for r in table(path)} == {
        "bare", "bare, apart", "composed", "step", "step, apart",
    }  # fmt: skip


@pytest.mark.parametrize("model", ["OPT-13B", "Llama-3-8B"])
def test_sentences_padded_and_packed(bench, tmp_path, capsys, model):
    path = tmp_path / "step.csv"
    wanted = ["--device", "cpu", "--repeats", "1", "--least-ms", "0", "--model", model, "--sst2"]
    bench.run(bench.parse([*wanted, "--dtype", "fp32", "--no-host", "--output", str(path)]))
    rows, shown = table(path), capsys.readouterr().out
    assert [r["contestant"] for r in rows] == ["bare", "step, padded", "step, packed"]
    assert {r["tokens"] for r in rows} == {"SST-2"} and "FAILED" not in shown
    losses = [line for line in shown.splitlines() if "loss padded" in line][0].split()
    assert abs(float(losses[-3].strip(",")) - float(losses[-1])) < 2e-4
    assert ("target 45" in shown) == (model == "OPT-13B")


def test_configs_have_the_shapes_of_the_real_models(bench):
    import model_shapes
    import step_models

    for name, config in step_models.CONFIGS.items():
        one = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1})
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(one)
        shapes = sorted(tuple(p.shape) for p in model.parameters())
        expected = model_shapes.MODELS[name]._replace(layers=1)
        if name.startswith("OPT"):  # 2048 positions and 2 that the model's code puts in front
            assert model.model.decoder.embed_positions.weight.shape[0] == 2050
        assert shapes == sorted(expected.tensors)
        assert config.num_hidden_layers == model_shapes.MODELS[name].layers
        assert step_models.narrow(config).num_hidden_layers == config.num_hidden_layers
