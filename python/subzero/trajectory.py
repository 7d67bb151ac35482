"""The trajectory: a fine-tune as its list of scalars. Format and contract: docs/trajectory.md.

With seed and contract fixed, an update with weight noise is a function of (draw, rho, lr); so the
file rebuilds the tuned weights without data or forward passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import state

if TYPE_CHECKING:
    from .optimizer import SubZero

_PIECE = 1 << 26  # bytes of a weight that are on the host at a time, per thread


def fingerprint(model: nn.Module) -> str:
    """A hash (blake2b, 32 hex digits) of names, shapes, dtypes and bytes of all parameters.

    Each tensor is hashed alone, in pieces, several at a time: hashing lets other threads run.
    """
    named = list(model.named_parameters())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda item: _digest(*item), named)
    whole = hashlib.blake2b(digest_size=16)
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def _digest(name: str, tensor: Tensor) -> bytes:
    h = hashlib.blake2b(digest_size=16)
    h.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _PIECE // flat.element_size())):
        h.update(piece.contiguous().view(torch.uint8).cpu().numpy())
    return h.digest()


class Recorder:
    """Appends a run to its file: a line a step, flushed; a line for each fold and refresh.

    Folds and refreshes carry a hash of all lines before them, so that a changed file is found.
    """

    def __init__(self, opt: SubZero, path: Path) -> None:
        _check_recordable(opt)
        queries, device = opt.options.queries, opt._weights.device
        # draw, whether finite, lr, rho per query: read in one transfer after the step
        self._row = torch.zeros(3 + queries, dtype=torch.int64, device=device)
        group = _group(opt)
        if opt.steps:
            raise ValueError(
                f"record: expected an optimizer without steps, got one at step {opt.steps}; record "
                "from the first step, or replay(path) on a fresh one and record(path, resume=True)"
            )
        header: dict[str, Any] = {
            "trajectory": 1,
            "contract": state.CONTRACT,
            "model": fingerprint(opt.model),
            "options": dataclasses.asdict(opt.options),
            "group": group,
            "trained": _trained(opt),
        }
        self._begin(path, "x", header["group"], hashlib.blake2b(digest_size=8))
        self._write(header)

    @classmethod
    def resumed(cls, opt: SubZero, path: Path) -> Recorder:
        """Goes on with the file that ``opt`` was replayed from; cuts off a torn last line."""
        trajectory = read(path, torn="drop")
        steps = trajectory.steps
        if steps != opt.steps:
            raise ValueError(
                f"record: expected an optimizer at step {steps}, where {path} ends, got step "
                f"{opt.steps}; replay(path) on a fresh optimizer first"
            )
        self = cls.__new__(cls)
        self._row = torch.zeros(
            3 + opt.options.queries, dtype=torch.int64, device=opt._weights.device
        )
        with open(path, "r+b") as file:
            file.truncate(trajectory.size)
        self._begin(path, "a", trajectory.group, trajectory.hash)
        return self

    def _begin(self, path: Path, mode: str, group: dict[str, Any], running: Any) -> None:
        self.path = path
        self._file = open(path, mode, encoding="ascii", newline="\n")  # noqa: SIM115
        self._said = group
        self._hash = running

    def take(self, rho: Tensor, finite: Tensor, lr: Tensor, rng: Tensor) -> None:
        """Within the step, captured or not: keep what the line will hold."""
        row = self._row
        row[:1].copy_(rng[1:])
        row[1].copy_(finite)
        row[2].copy_(lr.float().view(torch.int32))
        row[3:].copy_(rho.view(torch.int32))

    def step(self) -> None:
        """After the step: its line. Waits for the device."""
        draw, finite, lr, *rho = self._row.tolist()
        bits = [_hex(r) if finite else None for r in rho]
        self._write([draw, *bits, _hex(lr)])

    def group(self, opt: SubZero) -> None:
        """Before a step: a line if a number other than lr was changed."""
        group = _group(opt)
        if group != self._said:
            self._write({"group": group})
            self._said = group

    def event(self, **what: int) -> None:
        """A fold or a refresh."""
        self._write({**what, "hash": self._hash.hexdigest()})

    def loaded(self, steps: int) -> None:
        """Weights came from outside: the file says so, and ends there."""
        self._write({"loaded": steps})
        self.close()

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Any) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        self._file.write(text)
        self._file.flush()
        self._hash.update(text.encode())


@dataclass
class Trajectory:
    """A file that was read and checked."""

    header: dict[str, Any]
    lines: list[Any]
    group: dict[str, Any]  # the last that was said
    size: int  # bytes of whole lines
    hash: Any

    @property
    def steps(self) -> int:
        return sum(isinstance(line, list) for line in self.lines)


def read(path: str | os.PathLike[str], torn: str = "error") -> Trajectory:
    """Read and check a file. ``torn``: "error", or "drop" a last line that was not finished.

    Raises:
        ValueError: no trajectory, another version, a torn or changed line; with its number.
    """
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data) and torn != "drop":
        raise ValueError(
            f"{path}: expected a whole last line, got {data[len(whole) :][:40]!r}: the run was cut "
            "off while it wrote; replay with --drop-torn to leave that step out"
        )
    running = hashlib.blake2b(digest_size=8)
    lines: list[Any] = []
    header: dict[str, Any] = {}
    for number, text in enumerate(whole.splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if number == 1:
            header = line if isinstance(line, dict) else {}
            _check_header(path, header)
        else:
            _check_line(path, number, line, header["options"]["queries"], running.hexdigest())
            lines.append(line)
        running.update(text)
    if not header:
        raise ValueError(f"{path}: expected a trajectory, got an empty file; pass trajectory.jsonl")
    groups = [ln["group"] for ln in lines if isinstance(ln, dict) and "group" in ln]
    return Trajectory(header, lines, [header["group"], *groups][-1], len(whole), running)


def _check_header(path: Any, header: dict[str, Any]) -> None:
    if not {"trajectory", "contract", "model", "options", "group", "trained"} <= header.keys():
        raise ValueError(
            f"{path}: expected a trajectory's header in line 1, got something else; pass the file "
            "that record() wrote"
        )
    if (header["trajectory"], header["contract"]) != (1, state.CONTRACT):
        raise ValueError(
            f"{path}: expected contract {state.CONTRACT} of format 1, got {header['contract']} of "
            f"{header['trajectory']}; replay with the version that wrote it"
        )


def _check_line(path: Any, number: int, line: Any, queries: int, digest: str) -> None:
    good = False
    if isinstance(line, dict) and "loaded" in line:
        raise ValueError(
            f"{path}: expected a run that only trained, got one whose weights were loaded from "
            f"outside at step {line['loaded']}; replay cannot know them; record a new run"
        )
    if isinstance(line, list) and len(line) == queries + 2:
        draw, *rho, lr = line
        good = type(draw) is int and draw >= 0 and _is_bits(lr)
        good &= all(r is None for r in rho) or all(map(_is_bits, rho))
    elif isinstance(line, dict):
        good = "group" in line or (
            ("fold" in line or "window" in line) and line.get("hash") == digest
        )
    if not good:
        raise ValueError(
            f"{path}: expected line {number} and those before it as they were written, got a file "
            "that was changed; take an unchanged copy"
        )


def replay(opt: SubZero, trajectory: Trajectory) -> Iterator[int]:
    """Make the file's updates on a fresh optimizer; yields the steps done.

    The same functions as in training update cores and dense values from the same numbers in the
    same order, so on the same backend the result is the same to the bit. Afterwards ``opt`` is
    where the run was: ``fold`` gives the tuned weights, or training goes on.

    Raises:
        ValueError: another model, other options, steps made already, draws out of order.
    """
    _check_recordable(opt)
    _check_fits(opt, trajectory.header)
    opt._numbers.single.add("lr")
    opt.param_groups[0].update(_as_group(trajectory.header["group"]))
    queries, device = opt.options.queries, opt._weights.device
    rows = [line for line in trajectory.lines if isinstance(line, list)]
    finite = [row[1] is not None for row in rows]
    bits = [
        [struct.unpack(">f", bytes.fromhex(r or "00000000"))[0] for r in row[1:-1]] for row in rows
    ]
    rhos = torch.tensor(bits, dtype=torch.float32).to(device).view(-1, queries)
    finites = torch.tensor(finite, dtype=torch.bool).to(device)
    done = 0
    for line in trajectory.lines:
        if isinstance(line, list):
            if line[0] != done * queries:
                raise ValueError(
                    f"step {done}: expected draw {done * queries}, got {line[0]}; take an "
                    "unchanged copy of the file"
                )
            opt.param_groups[0]["lr"] = struct.unpack(">f", bytes.fromhex(line[-1]))[0]
            opt._redo(rhos[done], finites[done], last=done + 1 == len(rows))
            done += 1
            yield done
        elif "group" in line:
            opt.param_groups[0].update(_as_group(line["group"]))
        elif "fold" in line:
            opt.fold()
        else:
            opt._open_window()


def _check_recordable(opt: SubZero) -> None:
    if opt.options.activation:
        raise ValueError(
            "trajectory: expected noise='weight', got 'activation', whose update needs the inputs "
            "too; keep checkpoints, or one adapter a window with export_lora"
        )
    if opt.options.apply == "in_place":
        raise ValueError(
            "trajectory: expected apply='forward', got 'in_place', whose rounding of noise in the "
            "weights only forward passes repeat; use apply='forward'"
        )
    if any(space.dtype != torch.float32 for _, space in opt._weights.spaces()):
        raise ValueError(
            "trajectory: expected a model of fp32 or 16-bit weights, got float64, which fp32 "
            "scalars do not rebuild; convert the model with model.float()"
        )


def _check_fits(opt: SubZero, header: dict[str, Any]) -> None:
    if opt.steps:
        raise ValueError(
            f"replay: expected an optimizer without steps, got one at step {opt.steps}; build it "
            "anew over the model as it was before training"
        )
    for name, value in dataclasses.asdict(opt.options).items():
        if header["options"].get(name) != value:
            raise ValueError(
                f"replay: expected {name}={header['options'].get(name)!r} as in the file, got "
                f"{value!r}; build SubZero with the file's options"
            )
    if _trained(opt) != header["trained"]:
        raise ValueError(
            f"replay: expected the {len(header['trained'])} trained parameters of the file, got "
            f"{len(_trained(opt))} others; set requires_grad as in the run"
        )
    found = fingerprint(opt.model)
    if found != header["model"]:
        raise ValueError(
            f"replay: expected the model {header['model']} the run started from, got {found}; load "
            "those weights in the dtype of the run"
        )


def _trained(opt: SubZero) -> list[str]:
    return [e.name for e in opt._weights.plan.entries]


def _group(opt: SubZero) -> dict[str, Any]:
    # lr stands in every step's line
    names = [name for name in state.GROUP if name != "lr"]
    held = opt.param_groups[0]
    return {
        name: [float(b) for b in held[name]] if name == "betas" else float(held[name])
        for name in names
    }


def _as_group(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "betas": tuple(group["betas"])}


def _hex(bits: int) -> str:
    return f"{bits & 0xFFFFFFFF:08x}"


def _is_bits(text: Any) -> bool:
    if not (isinstance(text, str) and len(text) == 8):
        return False
    try:
        int(text, 16)
    except ValueError:
        return False
    return True
