"""A run as a file of scalars, and a run made again from one: SubZero and its trajectories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from . import trajectory

if TYPE_CHECKING:
    from .optimizer import SubZero


class Recording:
    """The part of SubZero that writes and replays trajectories (trajectory.py, the format)."""

    _recorder: trajectory.Recorder | None = None

    def record(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        """Append every step from now on to a trajectory file, flushed each step; see ``replay``.

        Weight noise with apply="forward". From here on lr is rounded to fp32, as it is written,
        and each step waits for the device. ``resume``: go on with the file just replayed.
        ``detach`` or ``stop_recording`` closes the file.

        Raises:
            ValueError: other noise, in_place, steps made before, float64 weights.
            FileExistsError: ``path`` exists and ``resume`` is False.
        """
        opt = cast("SubZero", self)
        self.stop_recording()
        make = trajectory.Recorder.resumed if resume else trajectory.Recorder
        self._recorder = make(opt, Path(path))
        opt._numbers.single.add("lr")

    def stop_recording(self) -> None:
        """Close the trajectory, if there is one."""
        if self._recorder:
            self._recorder.close()
            self._recorder = None

    @torch.no_grad()
    def replay(self, path: str | os.PathLike[str], torn: str = "error") -> None:
        """Make the updates of a trajectory, without data or forwards; ``fold`` gives the weights.

        On the same backend they are those of training, bit for bit, and training may go on.

        Args:
            path: what ``record`` wrote.
            torn: "error", or "drop" a last line that was cut off.

        Raises:
            ValueError: another model, other options, a torn or changed file, another version.
        """
        for _ in trajectory.replay(cast("SubZero", self), trajectory.read(path, torn)):
            pass

    def _record_step(self) -> None:
        if self._recorder:
            self._recorder.step()
