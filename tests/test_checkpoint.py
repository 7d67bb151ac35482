"""The output folder is complete or not there, whatever the disk does."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from subzero.checkpoint import check_output, write_folder
from subzero.errors import CommandError


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill(folder):
    (folder / "a").write_text("new")


def test_written_folder_and_nothing_else(tmp_path):
    write_folder(tmp_path / "x" / "out", fill)
    assert tree(tmp_path) == ["x", "x/out", "x/out/a"]
    assert (tmp_path / "x" / "out").stat().st_mode & 0o777 == 0o777 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_folder_is_filled_and_a_full_one_replaced_only_if_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_folder(out, fill)
    (out / "old").write_text("old")
    with pytest.raises(CommandError, match="could not be written to .*out: the folder was filled"):
        write_folder(out, fill)
    assert tree(out) == ["a", "old"]
    write_folder(out, fill, overwrite=True)
    assert tree(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("no\nreason")]
)
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    out = tmp_path / "out"
    write_folder(out, fill)

    def half(folder):
        (folder / "half").write_text("half")
        raise error

    for target in (out, tmp_path / "new" / "deep"):
        with pytest.raises(CommandError) as raised:
            write_folder(target, half, overwrite=True)
        assert raised.value.code == 1
        assert re.search("No space left on device;|: no;", str(raised.value))
    assert tree(tmp_path) == ["out", "out/a"]


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupted(folder):
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGINT)

    # a shell's background jobs inherit SIGINT ignored, and Python then leaves it so
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "out", interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "expected a folder, got the file"),
        ("full", "is not empty; choose another folder or add --overwrite"),
        ("file/out", "cannot write in .*file; choose"),
    ],
)
def test_outputs_refused_before_any_work(tmp_path, target, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(CommandError, match=message):
        check_output(tmp_path / target, overwrite=False)
    check_output(tmp_path / "full", overwrite=True)


def test_too_little_space_is_said_before_any_work(tmp_path):
    with pytest.raises(CommandError, match="needs 1,099,511,627,776.0 MiB, .* MiB free"):
        check_output(tmp_path / "out", overwrite=False, needed=2**60)


SAVE = """
import sys
from pathlib import Path
from tiny_task import llama
from subzero.checkpoint import write_folder
from subzero.errors import CommandError
try:
    write_folder(Path(sys.argv[1]), llama(500).save_pretrained)
except CommandError as error:
    sys.exit(str(error))
"""


def test_a_model_larger_than_the_disk_takes(tmp_path):
    """The kernel refuses files above 64 KiB, as a full disk or a quota does."""
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(tmp_path / "runs" / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "nothing was left there" in done.stderr
    assert tree(tmp_path) == []
