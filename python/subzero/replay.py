"""``subzero replay``: tuned weights from a model and a trajectory, without data or forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from . import trajectory
from .checkpoint import check_output, write_folder
from .errors import CommandError
from .models import load_model
from .optimizer import SubZero


def replay(
    model: str,
    file: str,
    output: str,
    dtype: str = "float32",
    device: str = "auto",
    drop_torn: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> None:
    """Write the model that the recorded run ended with, as plain transformers loads it.

    Raises:
        CommandError: anything the user can put right; nothing is written then.
    """
    console = console or Console()
    folder = Path(output).expanduser()
    check_output(folder, overwrite)
    if not Path(file).is_file():
        raise CommandError(f"{file}: expected a trajectory, got no file; check the path")
    try:
        read = trajectory.read(file, "drop" if drop_torn else "error")
        loaded = load_model(model, dtype, device)
        opt = optimizer(loaded.model, read.header)
        steps = trajectory.replay(opt, read)
        for _ in track(steps, "replaying", total=read.steps, console=console):
            pass
    except ValueError as error:
        raise CommandError(str(error)) from error
    opt.detach()

    def write(where: Path) -> None:
        loaded.model.save_pretrained(where)
        loaded.tokenizer.save_pretrained(where)

    write_folder(folder, write, overwrite)
    console.print(f"{read.steps} steps replayed, written to {folder}", markup=False)


def optimizer(model: Any, header: dict[str, Any]) -> SubZero:
    """SubZero over ``model`` as the header says: its options, and what is trained."""
    trained = set(header["trained"])
    missing = sorted(trained - {name for name, _ in model.named_parameters()})
    if missing:
        raise ValueError(
            f"replay: expected the trained parameter {missing[0]}, got a model without it; pass "
            "the model the run started from"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    group = {**header["group"], "betas": tuple(header["group"]["betas"])}
    return SubZero(model, **header["options"], **group)
