"""The weights that activation noise trains, between and during steps.

    core   W + U S V^T     right   W + B V^T     full   W written in place

V is the top right-singular vectors of the rows a linear sees: of the first step's, or what
``bases_from`` saw; a new window takes those of the last rows seen. Whatever outlives a step has
memory of its own that is written in place, since captured graphs read it there.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subzero_kernels import PURPOSE_BASIS_U, fold_, orthonormal_basis, stream_id

from .activation import ActivationPath, Tap, stacks_of
from .alignment import aligned_bases
from .credit import Credit, CreditPlan
from .forms import CreditSpace, FullSpace
from .options import Options
from .seen import SeenRows
from .side_path import LowRank
from .spaces import Space
from .trained import TrainedWeights

# V is made of at most so many times r rows: a decomposition grows with their number's cube.
_ALIGNED_ROWS = 16


class ActivationWeights(TrainedWeights):
    """State, bases and taps of every credited weight."""

    def __init__(self, plan: CreditPlan, options: Options) -> None:
        super().__init__(plan, options)
        self.plan: CreditPlan = plan
        self.side = ActivationPath(self.device)
        self.taps = [Tap(credit, self.dtype) for credit in plan.entries]
        self.full = FullSpace(self.taps, self.dtype, self) if plan.form == "full" else None
        self.space: CreditSpace = self.full or CreditSpace(self.taps, self.dtype)
        self._seen: SeenRows | None = None  # made with the first rows
        self._bases: list[Tensor] = []  # of each tap, views of its stack's memory
        self._turned: list[Tensor] = []  # cores of transposed weights, (1, r, r) each
        self._eye: Tensor | None = None
        self._met_checked = False

    def spaces(self) -> Iterator[tuple[str, Space]]:
        """One: S, B or W of every credited weight."""
        yield "core", self.space

    @property
    def aligned(self) -> bool:
        """Whether V is known; form full needs none."""
        return self.full is not None or self.taps[0].basis is not None

    @property
    def seen(self) -> list[Tensor]:
        """The last rows x / |x| of each linear, at most 4 r; it waits for the device."""
        return [] if self._seen is None else self._seen.rows()

    @property
    def ready(self) -> bool:
        """Once V is known: the first rows are read."""
        return self.aligned

    def attach(self, model: nn.Module) -> None:
        """Hook the credited linears; V comes with the first rows."""
        self._own(model)
        for tap in self.taps:
            self.side.taps[id(tap.credit.param)] = tap
        self.side.stacks = stacks_of(self.taps)
        self.side.attach(model, self.hooks)
        self._draw_carriers(0)

    def detach(self) -> None:
        self.side.leave_all()
        self.hooks.remove()

    # bases

    def _draw_carriers(self, window: int) -> None:
        """U of form core: the contract's basis of the weight whose output carries the noise."""
        if self.plan.form != "core":
            return
        drawn: dict[int, Tensor] = {}
        for tap in self.taps:
            c = tap.credit
            if c.source in drawn:
                tap.carrier = drawn[c.source]
                continue
            basis = orthonormal_basis(
                c.m, c.rank, seed=self.options.seed, window=window,
                stream=stream_id(PURPOSE_BASIS_U, c.source),
                dtype=c.param.dtype, device=self.device,
            )  # fmt: skip
            tap.carrier = basis if tap.carrier is None else tap.carrier.copy_(basis)
            drawn[c.source] = tap.carrier

    def align(self, rows: list[Tensor], window: int) -> None:
        """V of every linear from rows x / |x|, and the side path at S = 0 or B = 0."""
        if self.full is not None:
            return
        ranks = {tap.credit.rank for tap in self.taps}
        indices = [tap.credit.index for tap in self.taps]
        bases = aligned_bases(rows, indices, ranks.pop(), self.options.seed, window)
        self._set_bases(
            [b.to(tap.credit.param.dtype) for b, tap in zip(bases, self.taps, strict=True)]
        )

    def _set_bases(self, bases: list[Tensor]) -> None:
        if not self._bases:
            place: dict[int, Tensor] = {}
            for stack in self.side.stacks:
                first = stack.taps[0].credit
                stack.bases = first.param.new_empty(len(stack.taps), first.n, first.rank)
                place |= {id(tap): held for tap, held in zip(stack.taps, stack.bases, strict=True)}
            self._bases = [place[id(tap)] for tap in self.taps]
        for tap, held, basis in zip(self.taps, self._bases, bases, strict=True):
            tap.basis = held.copy_(basis)
        self.show()

    def _forget_bases(self) -> None:
        self.side.matrices.clear()
        for tap in self.taps:
            tap.basis = None

    def show(self) -> None:
        """The side path evaluates what the state holds now."""
        if self.full is not None or not self.aligned:
            return
        if self._eye is None:
            rank = self.taps[0].credit.rank
            self._eye = torch.eye(rank, dtype=self.dtype, device=self.device)[None]
            if self.plan.form == "core":
                turned = [tap for tap in self.taps if tap.credit.transposed]
                self._turned = [self._eye.clone() for _ in turned]
        self._turn_cores()
        copies = iter(self._turned)
        for tap, state in zip(self.taps, self.space.views(self.space.value), strict=True):
            u, v, core = self._factors(tap, state, self._eye)
            if tap.carrier is not None and tap.credit.transposed:
                core = next(copies)
            self.side.matrices[id(tap.credit.param)] = LowRank(tap.credit, u, v, core)

    def _turn_cores(self) -> None:
        """A transposed core is a copy, all others are views of the state."""
        if not self._turned:
            return
        cores = zip(self.taps, self.space.views(self.space.value), strict=True)
        turned = [core.T for tap, core in cores if tap.credit.transposed]
        torch._foreach_copy_([held[0] for held in self._turned], turned)

    def _factors(self, tap: Tap, state: Tensor, eye: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(u, v, core) of the change U S V^T or B V^T in the orientation the weight is stored."""
        assert tap.basis is not None
        if tap.carrier is None:
            return (tap.basis, state, eye) if tap.credit.transposed else (state, tap.basis, eye)
        if tap.credit.transposed:
            return tap.basis, tap.carrier, state.T[None]
        return tap.carrier, tap.basis, state[None]

    # one step

    def begin_step(self) -> None:
        for tap in self.taps:
            tap.begin_step()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Around a step: whatever happens in it, no rows are left behind."""
        try:
            yield
        finally:
            self.side.leave_all()
            for tap in self.taps:
                tap.begin_step()

    def end_evaluation(self, finite: Tensor, window: int) -> None:
        """Rows are complete: the first step's give V, the last ones are remembered.

        A step that is skipped before V is known leaves it so, and has no rows to update with.
        """
        self._check_met()
        if not self.aligned:
            if not bool(finite):  # read once: the first steps give V
                for tap in self.taps:
                    tap.begin_step()
                return
            self.align_kept(window)
            for tap in self.taps:
                assert tap.basis is not None
                tap.kept = [rows @ tap.basis.to(rows.dtype) for rows in tap.kept]
        if self.full is None:
            self._seen_rows().take(finite)

    def _seen_rows(self) -> SeenRows:
        if self._seen is None:
            self._seen = SeenRows(self.taps, self.side.stacks)
        return self._seen

    @contextmanager
    def as_ready(self) -> Iterator[None]:
        """All memory is there, with some basis where none is known."""
        if self.full is not None:
            yield
            return
        self._seen_rows()
        aligned = self.aligned
        if not aligned:
            credits = [tap.credit for tap in self.taps]
            self._set_bases([c.param.new_zeros(c.n, c.rank) for c in credits])
        try:
            yield
        finally:
            if not aligned:
                self._forget_bases()

    def _check_met(self) -> None:
        """After the first evaluation: name what is credited but did not run where we look."""
        if self._met_checked:
            return
        self._met_checked = True
        unmet = [tap.credit.name for tap in self.taps if not tap.kept]
        if unmet:
            more = f" and {len(unmet) - 5} more" if len(unmet) > 5 else ""
            warnings.warn(
                f"SubZero: {', '.join(unmet[:5])}{more} took no part in the first step's forward, "
                "or the model reads it outside its own module; freeze it",
                stacklevel=4,
            )

    def align_kept(self, window: int) -> None:
        """V from the rows kept since the step began, not projected; of many, some in even steps."""
        if self.full is not None:
            return
        for tap in self.taps:
            tap.basis = None
        every = [_joined(tap.kept, tap) for tap in self.taps]
        most = _ALIGNED_ROWS * self.taps[0].credit.rank
        self.align([rows[:: max(1, -(-len(rows) // most))] for rows in every], window)

    def end_step(self) -> None:
        """The update is made."""
        self.changed = True
        if self.aligned:
            self._turn_cores()

    def decay_(self, factor: Tensor) -> None:
        """Decoupled weight decay: on the state now, on W's own part at the fold."""
        if self.full is not None:
            self.full.decay = factor
            return
        self.space.value.mul_(factor)
        self.decay.mul_(factor)
        self.decayed = True

    # windows and folds

    def open_window(self, window: int, state: dict[str, dict[str, Tensor]]) -> None:
        """New V from the last rows seen; in form right a kept momentum follows: M V_old^T V_new.

        Form full has no bases: its windows change nothing, and its state goes on.
        """
        if self.full is not None:
            return
        if self.options.state_at_refresh == "reset":
            for held in state["core"].values():
                held.zero_()
        self._draw_carriers(window)
        if not self.aligned:
            return
        follows = self.plan.form == "right" and "momentum" in state["core"]
        old = [basis.clone() for basis in self._bases] if follows else []
        self.align(self._seen_rows().in_order(), window)
        if follows:
            momenta = self.space.views(state["core"]["momentum"])
            for before, basis, m in zip(old, self._bases, momenta, strict=True):
                m.copy_(m @ (before.to(m.dtype).T @ basis.to(m.dtype)))

    def fold(self) -> None:
        """W = decay W + U S V^T or decay W + B V^T, then S or B = 0."""
        if not self.changed:
            return
        self.changed = False
        if self.full is not None or not self.aligned:
            return
        assert self._eye is not None
        with torch.no_grad():
            decay = float(self.decay) if self.decayed else 1.0
            for tap, state in zip(self.taps, self.space.views(self.space.value), strict=True):
                u, v, core = self._factors(tap, state, self._eye)
                rounding = self._rounding(tap.credit, self.fold_rng)
                weight = tap.credit.param.data
                fold_(weight, u, v, core[0].contiguous(), decay=decay, **rounding)
            self.folded()
            self.space.value.zero_()
            self.decay.fill_(1.0)
            self.decayed = False
            self._turn_cores()

    # saving

    def tensors(self) -> dict[str, Tensor]:
        """V and the rows for the next one; U follows from seed and window."""
        saved = {}
        for i, tap in enumerate(self.taps):
            if tap.basis is not None:
                saved[f"basis.{i}"] = tap.basis
        if saved:
            saved |= {f"seen.{i}": rows for i, rows in enumerate(self.seen)}
        return saved

    def expects(self, name: str, value: Tensor) -> bool:
        """Whether it is a basis, or rows, of one of the credited linears."""
        kind, _, number = name.partition(".")
        if self.full is not None or kind not in ("basis", "seen") or not number.isdigit():
            return False
        if number != str(int(number)) or int(number) >= len(self.taps):
            return False
        credit: Credit = self.taps[int(number)].credit
        if kind == "basis":
            return tuple(value.shape) == (credit.n, credit.rank)
        return value.dim() == 2 and value.shape[1] == credit.n and len(value) <= 4 * credit.rank

    def missing(self, names: Collection[str]) -> str:
        """Bases are saved of all linears or of none, and rows with them."""
        for kind, implied in (("basis", ("basis", "seen")), ("seen", ("seen",))):
            wanted = [f"{kind}.{i}" for i in range(len(self.taps))]
            absent = [name for name in wanted if name not in names]
            if absent and any(name.partition(".")[0] in implied for name in names):
                return absent[0]
        return ""

    def resume(self, window: int, tensors: dict[str, Tensor]) -> None:
        """Bases and rows as saved; none where no step had come."""
        self._draw_carriers(window)
        if self._seen is not None or "seen.0" in tensors:
            some = [tensors.get(f"seen.{i}") for i in range(len(self.taps))]
            self._seen_rows().restore(some)
        if "basis.0" in tensors:
            self._set_bases([tensors[f"basis.{i}"] for i in range(len(self.taps))])
        else:
            self._forget_bases()


def _joined(rows: list[Tensor], tap: Tap) -> Tensor:
    if rows:
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    p: Any = tap.credit.param
    return torch.zeros(0, tap.credit.n, dtype=tap.wide, device=p.device)
