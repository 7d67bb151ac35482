"""The command line: help for a stranger, one line for each error, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_task import save_model, save_rows

from subzero import __version__, cli


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_rows(folder / "rows.tsv")
    save_rows(folder / "other.tsv", header="sentence\tmood")
    (folder / "bad.tsv").write_text("text\tlabel\nfine\t1\nso so\t2\n")
    save_model(folder / "model")
    return folder


@pytest.fixture
def run(files, monkeypatch, capsys):
    """subzero ARGUMENTS in the folder of the files -> exit code, stdout, stderr."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["subzero", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


TRAIN = (
    "train model -o out --task movie-reviews --data rows.tsv --train-examples 64 --dev-examples 24 "
    "--test-examples 40 --steps 2 --device cpu"
).split()


def test_version_and_help(run):
    assert run("--version") == (0, f"subzero {__version__}\n", "")
    code, out, _ = run("train", "--help")
    assert code == 0
    for word in ("Task and data", "Model", "Training", "Optimizer", "Examples", "--rank"):
        assert word in out
    for default in ("activation/weight 0.03, mezo/adamw 0.0001", "--paper", "--method"):
        assert default in out


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--data", "none[1].tsv"], 2, "--data: no such file: none[1].tsv"),
        (["--data", "bad.tsv"], 2, "bad.tsv: row 2 has label '2', expected one of '0', '1'"),
        (["--data", "other.tsv"], 2, "other.tsv: no column 'text', found sentence, mood"),
        (["--task", "sst3"], 2, "--task: expected one of movie-reviews, sst2, rte, cb"),
        (["--label-words", "0=unheard-of,1=great"], 2, "is not one token"),
        (["--dev-examples", "0"], 2, "--dev-examples: expected at least 1, got 0"),
        (["--test-examples", "999"], 2, "leave nothing to train on: the data has 128"),
        (["--output", "model"], 2, "--output: model is not empty"),
        (["--output", "rows.tsv"], 2, "expected a folder, got the file rows.tsv"),
        (["--train-layers", "9"], 2, "expected layers from 0 to 3, got '9'"),
        (["--dtype", "int4"], 2, "--dtype: expected one of"),
        (["--rank", "0"], 2, "optimizer: rank: expected an integer of at least 1, got 0"),
        (["--queries", "2", "--method", "weight"], 2, "optimizer: queries: expected at least 4"),
        (["--form", "left"], 2, "optimizer: form: expected one of"),
        (["--method", "sgd"], 2, "--method: expected one of auto, activation, weight, mezo, adamw"),
        (["--method", "adamw", "--form", "core"], 2, "--form: expected only with --method activat"),
        (["--method", "mezo", "--rank", "4"], 2, "--rank: expected only with --method activation"),
        (["--paper", "--method", "mezo"], 2, "--paper: expected weight noise"),
        (["--form", "core", "--sides", "two"], 2, "(--sides is not for noise on activations)"),
        (["--train-modules", "o_proj,qkv"], 2, "--train-modules: no module 'qkv' in these layers"),
        (["--eps", "nan"], 2, "optimizer: eps: expected a finite number"),
        (["--rule", "rmsprop"], 2, "optimizer: rule: expected one of"),
        (["--steps", "0"], 2, "--steps: expected at least 1, got 0"),
        (["--schedule", "step"], 2, "--schedule: expected cosine, linear or constant"),
        (["--max-minutes", "0"], 2, "--max-minutes: expected a number above 0"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(run, files, change, code, message):
    before = sorted(files.rglob("*"))
    got, out, err = run(*TRAIN, *change)
    assert got == code
    assert message in err and err.startswith("error ") and err.count("\n") == 1
    assert "Traceback" not in out + err
    assert sorted(files.rglob("*")) == before


def test_a_missing_model_folder(run):
    code, _, err = run("train", "./none", *TRAIN[2:])
    assert (code, err) == (2, "error model: no such folder or file: ./none\n")


def test_debug_shows_where_an_error_comes_from(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", ["subzero", *TRAIN, "--data", "none.tsv", "--debug"])
    with pytest.raises(cli.CommandError, match="no such file"):
        cli.main()


def test_own_columns_template_and_words(run, files):
    own = ["--template", "{x} It was", "--label-words", "0=terrible,1=great"]
    own += ["--text-column", "sentence", "--label-column", "mood", "--data", "other.tsv"]
    arguments = [a for a in TRAIN if a not in ("--task", "movie-reviews")]
    code, out, err = run(*arguments, *own, "-o", "own")
    assert code == 0, err
    assert "before, zero-shot calibrated" in out and "best on dev" in out
    assert (
        "--template '{x} It was' --label-words 0=terrible,1=great"
        in (files / "own" / "command.txt").read_text()
    )


def test_the_papers_recipe_is_one_flag(run, files):
    short = ["--paper", "--apply", "in_place", "-o", "paper"]
    code, out, err = run(*TRAIN, *short)
    assert code == 0, err
    assert "SubZero, noise on weights (--paper)" in out
    settings = json.loads((files / "paper" / "run.json").read_text())["settings"]
    assert settings["queries"] == 1 and settings["sides"] == "two" and settings["rule"] == "sgd"
    assert settings["lr"] == 1e-6 and settings["steps"] == 2 and settings["apply"] == "in_place"


def test_as_a_program(files):
    """python -m subzero, in a process of its own."""
    path = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "subzero", *TRAIN, "--output", "program"],
        cwd=files,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (files / "program" / "model.safetensors").exists()
    assert (files / "program" / "command.txt").read_text().startswith("subzero train model -o out")
