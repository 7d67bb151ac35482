"""The demo's files: made once, whole or not at all, and only from what is pinned."""

from __future__ import annotations

import hashlib

import pytest

from subzero import demo
from subzero.errors import CommandError


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
