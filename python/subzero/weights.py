"""The trained weights: what is stored, how a group's perturbation is shown, how it is folded.

Within a window a matrix is W + U S V^T. apply="forward" shows group g's core C_g through the side
path; matrices without one are rewritten from a pristine copy; apply="in_place" adds the difference
to the weights themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subzero_kernels import (
    PURPOSE_BASIS_U,
    PURPOSE_BASIS_V,
    PURPOSE_CORE,
    PURPOSE_ROUNDING,
    core_noise_,
    fold_,
    orthonormal_basis,
    perturb_plan,
    stream_id,
)
from subzero_kernels.rng import round_stochastic, words

from .options import Options
from .plan import COPY, DENSE_COPY, SIDE, Entry, Plan
from .side_path import DenseValue, LowRank, SidePath
from .spaces import CoreSpace, DenseSpace, Space
from .trained import TrainedWeights


class Weights(TrainedWeights):
    """All trained parameters of one model between and during steps, with noise in the weights."""

    def __init__(self, plan: Plan, options: Options) -> None:
        super().__init__(plan, options)
        self.side = SidePath()
        self.cores = CoreSpace(plan.factored, self.dtype) if plan.factored else None
        self.masters = DenseSpace(plan.dense, self.dtype) if plan.dense else None
        self._bases: list[tuple[Tensor, Tensor]] = []
        self._copies: dict[int, Tensor] = {}
        self._rng = torch.zeros(2, dtype=torch.int64)
        self._coeff = torch.zeros(1, 1)
        self._signs = _sign_matrix(options).to(self.device)
        self._shown = 0
        self._group_cores: list[Tensor] = []
        self._group_values: list[Tensor] = []

    def spaces(self) -> Iterator[tuple[str, Space]]:
        """What rules update: the cores and the dense masters, where there are any."""
        if self.cores:
            yield "core", self.cores
        if self.masters:
            yield "dense", self.masters

    # attaching

    def attach(self, model: nn.Module) -> None:
        """Track, hook and draw the bases of the first window."""
        self._own(model)
        for e in self.plan.dense:
            if e.way != DENSE_COPY:
                empty = e.param.new_empty(0)
                self.side.dense[id(e.param)] = DenseValue(e, empty)
        for e in self.plan.factored:
            if e.way == COPY:
                self._copies[e.index] = e.param.detach().clone()
            elif e.way == SIDE:
                empty = e.param.new_empty(0)
                self.side.matrices[id(e.param)] = LowRank(e, empty, empty, empty)
        self.side.attach(model, self.hooks)
        self.draw_bases(0)

    def detach(self) -> None:
        self.side.leave_all()
        self.hooks.remove()
        self._copies.clear()

    def open_window(self, window: int, state: dict[str, dict[str, Tensor]]) -> None:
        """Bases of the window; the cores' rule state is kept or reset."""
        if self.options.state_at_refresh == "reset":
            for held in state["core"].values():
                held.zero_()
        self.draw_bases(window)

    def resume(self, window: int, tensors: dict[str, Tensor]) -> None:
        """The masters as saved, and the window's bases."""
        if self.masters and "dense.value" in tensors:
            self.masters.value.copy_(tensors["dense.value"])
        self.draw_bases(window)

    def tensors(self) -> dict[str, Tensor]:
        """The masters of dense parameters: bases follow from seed and window."""
        return {"dense.value": self.masters.value} if self.masters else {}

    def expects(self, name: str, value: Tensor) -> bool:
        """Whether these are masters of as many numbers."""
        held = self.tensors().get(name)
        return held is not None and held.shape == value.shape

    def missing(self, names: Collection[str]) -> str:
        """The masters, where there are any."""
        return next((name for name in self.tensors() if name not in names), "")

    def draw_bases(self, window: int) -> None:
        """U and V of every matrix: QR of the contract's normals, draw = index of the window.

        Those of a later window take the memory of the first: captured graphs read them there.
        """
        if self._bases:
            for e, held in zip(self.plan.factored, self._bases, strict=True):
                for old, new in zip(held, self._basis_pair(e, window), strict=True):
                    old.copy_(new)
        else:
            self._bases = [self._basis_pair(e, window) for e in self.plan.factored]
            self._place_bases()
        self._show_current()

    def _place_bases(self) -> None:
        for e, (u, v) in zip(self.plan.factored, self._bases, strict=True):
            if e.way == SIDE:
                low = self.side.matrices[id(e.param)]
                low.u, low.v = u, v
        ws = [e.param for e in self.plan.factored]
        if self.options.apply == "in_place" and ws:
            us, vs = [u for u, _ in self._bases], [v for _, v in self._bases]
            streams = [stream_id(PURPOSE_CORE, e.index) for e in self.plan.factored]
            with torch.no_grad():
                self._perturb = perturb_plan(ws, us, vs, streams)

    def _basis_pair(self, e: Entry, window: int) -> tuple[Tensor, Tensor]:
        m, n = e.factor
        kind: dict[str, Any] = dict(dtype=e.param.dtype, device=e.param.device)
        return tuple(  # type: ignore[return-value]
            orthonormal_basis(
                rows,
                e.rank,
                seed=self.options.seed,
                window=window,
                stream=stream_id(purpose, e.index),
                **kind,
            )
            for rows, purpose in ((m, PURPOSE_BASIS_U), (n, PURPOSE_BASIS_V))
        )

    # one step

    @contextmanager
    def perturbed(self, eps: Tensor, rng: Tensor) -> Iterator[list[tuple[int | None, int]]]:
        """Prepare all groups of a step; afterwards the weights show what the update made of them.

        Yields (query, sign) of every group; ``show(g)`` or ``show_all`` evaluate them.
        """
        signs = self.options.signs()
        self._coeff = self._signs * eps
        self._rng = rng
        self._shown = -1
        if self.cores and self.options.apply == "forward":
            self._group_cores = self.cores.evaluation(self._coeff, rng)
        if self.masters:
            self._group_values = self.masters.evaluation(self._coeff, rng, signs)
        in_place = self.options.apply == "in_place"
        before = self.cores.value.clone() if self.cores and in_place else torch.zeros(())
        try:
            yield signs
        finally:
            self.side.leave_all()
            if in_place and self.cores and self._shown >= 0:
                self._settle(self.cores.value - before)
            self._group_cores, self._group_values = [], []
            self.changed = True
            self._show_current()

    def show_all(self, rows: int) -> None:
        """All groups at once: axis 0 of every module's input holds them in order."""
        self.side.groups, self.side.rows = self._coeff.shape[0], rows
        self._set_cores(self._group_cores)
        self._set_values(self._group_values)

    def show(self, g: int) -> None:
        """Group g alone."""
        self.side.groups = self.side.rows = 1
        if self.options.apply == "in_place":
            if self.plan.factored:
                self._perturb.perturb_(self._coeff[g] - self._coefficient(self._shown), self._rng)
        else:
            self._set_cores([c[g : g + 1] for c in self._group_cores])
            self._write_copies([c[g] for c in self._group_cores], self._rng)
        self._set_values([v[g : g + 1] for v in self._group_values])
        self._write_dense([v[g] for v in self._group_values], self._rng)
        self._shown = g

    def _coefficient(self, g: int) -> Tensor:
        return torch.zeros_like(self._coeff[0]) if g < 0 else self._coeff[g]

    def _settle(self, change: Tensor) -> None:
        """apply="in_place": undo the last perturbation and add the update, in one pass over W."""
        assert self.cores
        core = self.cores.views(change)
        noise = -self._coefficient(self._shown)[None]
        streams, mus = self.cores.streams, self.cores.mus
        core_noise_([c[None] for c in core], core, noise, self._rng, streams=streams, mu=mus)
        self._shown = -1
        self._fold_into([e.param for e in self.plan.factored], core, 1.0)
        self.folded()

    def updated(self, rng: Tensor, show: bool) -> None:
        """An update came without evaluations; ``show`` it, as the last one of several."""
        self._rng = rng
        self.changed = True
        if show:
            self._show_current()

    def decay_(self, factor: Tensor) -> None:
        """Decoupled weight decay of a step: on S now, on W's own part at the fold."""
        if self.cores:
            self.cores.value.mul_(factor)
            self.decay.mul_(factor)
            self.decayed = True

    # between steps

    def _show_current(self) -> None:
        """The model evaluates W + U S V^T and the masters."""
        self.side.groups = self.side.rows = 1
        if self.cores:
            cores = self.cores.views(self.cores.value)
            self._set_cores([c[None] for c in cores])
            if self.changed and self.options.apply == "forward":
                self._write_copies(cores, self._rng)
        if self.masters:
            values = self.masters.views(self.masters.value)
            self._set_values([v[None] for v in values])
            if self.changed:
                self._write_dense(values, self._rng)

    def _set_cores(self, cores: list[Tensor]) -> None:
        for e, core in zip(self.plan.factored, cores, strict=False):
            if e.way == SIDE:
                self.side.matrices[id(e.param)].core = core

    def _set_values(self, values: list[Tensor]) -> None:
        for e, value in zip(self.plan.dense, values, strict=False):
            if e.way != DENSE_COPY:
                self.side.dense[id(e.param)].values = value

    def _write_copies(self, cores: list[Tensor], rng: Tensor) -> None:
        for e, (u, v), core in zip(self.plan.factored, self._bases, cores, strict=False):
            if e.way == COPY:
                e.param.copy_(self._copies[e.index])
                fold_(e.param, u, v, core, **self._rounding(e, rng, perturbing=True))

    def _write_dense(self, values: list[Tensor], rng: Tensor) -> None:
        for e, value in zip(self.plan.dense, values, strict=False):
            if e.way == DENSE_COPY:
                if e.param.dtype in (torch.bfloat16, torch.float16):
                    word = words(rng, stream_id(PURPOSE_ROUNDING, e.index), value.numel())
                    value = round_stochastic(value, word, e.param.dtype)
                e.param.copy_(value.view(e.param.shape))

    # folding

    def fold(self) -> None:
        """W = decay W + U S V^T, S = 0, decay = 1; nothing where no step came since the last."""
        if not self.changed:
            return
        with torch.no_grad():
            if self.cores:
                # in place, W holds U S V^T already: decay W + (1 - decay) U S V^T is the same
                decay = float(self.decay) if self.decayed else 1.0
                in_place = self.options.apply == "in_place"
                core = self.cores.value * (1 - decay if in_place else 1.0)
                targets = [self._copies.get(e.index, e.param) for e in self.plan.factored]
                if not in_place or decay != 1:
                    self._fold_into(targets, self.cores.views(core), decay)
                    self.folded()
                for e in self.plan.factored:
                    if e.way == COPY:
                        e.param.copy_(self._copies[e.index])
                self.cores.value.zero_()
                self.decay.fill_(1.0)
            if self.masters:
                self.masters.write_parameters()
            self.changed = self.decayed = False

    def _fold_into(self, targets: list[Any], cores: list[Tensor], decay: float) -> None:
        for e, w, (u, v), core in zip(self.plan.factored, targets, self._bases, cores, strict=True):
            rounding = self._rounding(e, self.fold_rng, perturbing=False)
            fold_(w, u, v, core, decay=decay, **rounding)

    def reread(self, module: nn.Module) -> None:
        """The module's own parameters were loaded from outside (after a fold): start from them."""
        super().reread(module)
        own = set(map(id, self._owned.get(module, {}).values()))
        for e in self.plan.entries:
            if id(e.param) in own and e.way == COPY:
                self._copies[e.index].copy_(e.param.detach())
        if self.masters and own:
            self.masters.read_parameters(own)


def _sign_matrix(options: Options) -> Tensor:
    """(G, K) fp32: the sign with which group g takes the noise of query k."""
    signs = options.signs()
    matrix = torch.zeros(len(signs), options.queries, device="cpu")
    for g, (k, sign) in enumerate(signs):
        if k is not None:
            matrix[g, k] = sign
    return matrix
