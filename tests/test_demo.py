"""The demo's files: made once, whole or not at all, and only from what is pinned."""

from __future__ import annotations

import hashlib

import pytest
from typer.testing import CliRunner

from subzero import cli, demo, trainer
from subzero.errors import CommandError
from subzero.settings import methods_to_try


def test_a_file_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return b"content"

    for _ in range(2):
        assert demo._once(tmp_path / "file", make).read_bytes() == b"content"
    assert made == [1]


def test_a_failure_leaves_no_part_of_a_file(tmp_path):
    with pytest.raises(TypeError):
        demo._once(tmp_path / "file", lambda: "text is not bytes")
    assert list(tmp_path.iterdir()) == []


def test_other_content_than_pinned_is_refused():
    demo._verify("x", b"content", hashlib.sha256(b"content").hexdigest())
    with pytest.raises(CommandError, match="x: expected sha256 00, got [0-9a-f]{64}; not used"):
        demo._verify("x", b"content", "00")


def test_the_demo_is_the_default_recipe(tmp_path, monkeypatch):
    """It names no method and no number of the recipe, and what it names the command takes."""
    calls = []
    monkeypatch.setattr(demo, "CACHE", tmp_path)
    monkeypatch.setattr(demo, "_once", lambda path, make: path)
    monkeypatch.setattr(
        demo.subprocess, "call", lambda command, **how: calls.append((command, how)) or 7
    )
    monkeypatch.delenv("SUBZERO_CACHE", raising=False)
    assert demo.main(["--seed", "3"]) == 7
    ((command, how),) = calls
    assert command[1:4] == ["-m", "subzero", "train"] and how["env"]["SUBZERO_CACHE"] == str(
        tmp_path
    )
    taken = []
    monkeypatch.setattr(trainer, "train", lambda settings, command: taken.append(settings))
    CliRunner().invoke(cli.app, command[3:], catch_exceptions=False)
    (settings,) = taken
    assert settings.seed == 3 and settings.output == "runs/movie-reviews" and settings.overwrite
    assert methods_to_try(settings)[0][0] == "activation"
    for name in ("method", "steps", "lr", "queries", "rule", "rank", "form"):
        assert getattr(settings, name) in (None, "auto")
    assert settings.max_minutes == 5.5
