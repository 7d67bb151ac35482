"""An output folder that is either complete or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import CommandError


def check_output(folder: Path, overwrite: bool, needed: int = 0) -> None:
    """One error, before any work is done, if the result could not be written.

    Args:
        folder: where the result goes.
        overwrite: whether a folder that is not empty may be replaced.
        needed: bytes the result takes.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--output: expected a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CommandError(
            f"--output: {folder} is not empty; choose another folder or add --overwrite"
        )
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"--output: cannot write in {parent}; choose another folder")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CommandError(
            f"--output: {folder} needs {needed / 2**20:,.1f} MiB, {parent} has "
            f"{free / 2**20:,.1f} MiB free; free some space or choose another folder"
        )


def write_folder(folder: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """``fill_folder`` for commands.

    Raises:
        CommandError: whatever kept the result from being written (a full disk, say), exit code 1.
    """
    try:
        fill_folder(folder, write, overwrite)
    except Exception as error:
        # safetensors, matplotlib and json report a full disk each in its own way.
        raise CommandError(
            f"--output: the result could not be written to {folder.absolute()}: {reason(error)}; "
            "nothing was left there, put that right and run the command again",
            code=1,
        ) from error


def fill_folder(folder: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """``write(temporary)`` fills a folder beside ``folder``, which then takes its name.

    If writing fails nothing is left: neither the temporary folder nor part of the result, and
    what was at ``folder`` is as before.
    """
    folder = folder.absolute()
    made = _missing_parents(folder)
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        write(partial)
        partial.chmod(0o777 & ~_umask())
        _replace(partial, folder, overwrite)
    except BaseException:
        _remove(partial, made)
        raise


def _replace(partial: Path, folder: Path, overwrite: bool) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "the folder was filled in the meantime", str(folder))
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    os.replace(folder, aside)
    try:
        os.replace(partial, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _missing_parents(folder: Path) -> list[Path]:
    """Parents that do not exist yet, innermost first."""
    return [p for p in folder.parents if not p.exists()]


def _remove(partial: Path | None, made: list[Path]) -> None:
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    for parent in made:
        try:
            parent.rmdir()
        except OSError:
            return


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
