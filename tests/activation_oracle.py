"""One step of activation noise as DESIGN writes it, in float64: plain forwards and forward hooks.

Nothing of ``subzero`` is used. Every weight is materialised, every group is a forward of its own,
noise comes element by element from the contract's generator, V from an SVD.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from subzero_kernels import make_rng, orthonormal_basis
from subzero_kernels.rng import normals

U_PURPOSE, V_PURPOSE, NOISE_PURPOSE = 2, 3, 5
WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h")
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:.*\.)?(\w+)\.weight$")


@dataclass
class Micro:
    """A micro-batch: which rows are noisy and scored (B, T), their numbers in the contract."""

    batch: Any
    noisy: Tensor
    scored: Tensor
    example: Tensor  # (B, T) int64, counted on through the step
    position: Tensor  # (B, T) int64


def micro(
    batch: Any, scored: Tensor, first: int = 0, everywhere: bool = False, starts: Any = None
) -> Micro:
    """A micro-batch with one sequence a row, or with packed ones beginning at ``starts``."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    example, position = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["input_ids"])
    number = first - 1
    for b in range(real.shape[0]):
        count = 0
        for t in range(real.shape[1]):
            if t == 0 or (starts is not None and t in starts[b]):
                number, count = number + 1, 0
            example[b, t], position[b, t] = number, count
            count += int(real[b, t])
    return Micro(batch, real if everywhere else scored & real, scored & real, example, position)


@dataclass
class Site:
    """One credited linear y = x W^T, W (m, n); ``source`` is the index of the noisy weight."""

    name: str
    module: nn.Module
    index: int
    block: int
    leaf: str
    transposed: bool
    w: Tensor
    source: int = -1
    u: Tensor | None = None
    v: Tensor | None = None
    value: Tensor | None = None  # S or B
    state: dict[str, Any] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    seen: Tensor | None = None

    @property
    def m(self) -> int:
        return self.w.shape[0]

    @property
    def n(self) -> int:
        return self.w.shape[1]


class Oracle:
    """The step, the window and the rules of section 6; ``like(i)`` fixes the signs of V's columns.

    Singular vectors have no sign of their own, and a state that is kept over a refresh depends on
    it: ``like`` gives the basis whose signs count, once it spans the same lines.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        form: str,
        credit: str,
        rule: str,
        rank: int,
        lr: float,
        eps: float,
        queries: int,
        seed: int,
        refresh_every: int = 1000,
        discount: float = 0.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_at_refresh: str = "reset",
        like: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.form, self.rule, self.rank, self.lr, self.eps = form, rule, rank, lr, eps
        self.queries, self.seed, self.refresh_every = queries, seed, refresh_every
        self.discount, self.momentum, self.betas = discount, momentum, betas
        self.adam_eps, self.weight_decay, self.keep = adam_eps, weight_decay, state_at_refresh
        self.like = like
        self.steps, self.decay = 0, 1.0
        self._noise: dict[tuple[int, int, int], Tensor] = {}
        self.sites = self._sites()
        last = {s.block: s.index for s in self.sites if s.leaf in WRITERS}
        for s in self.sites:
            shared = credit == "block" and s.leaf in WRITERS
            s.source = last[s.block] if shared else s.index
        self._draw_u(0)

    def _sites(self) -> list[Site]:
        modules = dict(self.model.named_modules())
        found = []
        for index, (name, p) in enumerate(self.model.named_parameters()):
            match = _IN_BLOCK.search(name)
            if match is None or p.dim() != 2 or not p.requires_grad:
                continue
            module = modules[name.removesuffix(".weight")]
            turned = type(module).__name__ == "Conv1D"
            w = (p.detach().T if turned else p.detach()).clone()
            found.append(Site(name, module, index, int(match[1]), match[2], turned, w))
        return found

    # bases

    def _draw_u(self, window: int) -> None:
        for s in self.sites if self.form == "core" else []:
            source = next(t for t in self.sites if t.index == s.source)
            s.u = orthonormal_basis(
                source.m, self.rank, seed=self.seed, window=window,
                stream=U_PURPOSE << 28 | s.source, dtype=torch.float64,
            )  # fmt: skip

    def _set_v(self, number: int, rows: Tensor, window: int) -> None:
        s, r = self.sites[number], self.rank
        _, values, vh = torch.linalg.svd(rows, full_matrices=False)
        known = int((values > 1e-6 * values[0]).sum()) if len(values) else 0
        v = vh[: min(known, r)].T
        if v.shape[1] < r:
            rng = make_rng(self.seed, window)
            extra = normals(rng, V_PURPOSE << 28 | s.index, s.n * r).double().view(s.n, r)
            for j in range(r - v.shape[1]):
                column = extra[:, j] - v @ (v.T @ extra[:, j])
                column = column - v @ (v.T @ column)
                v = torch.cat([v, (column / column.norm())[:, None]], 1)
        if self.like is not None:
            dots = (v * self.like(number)).sum(0)
            assert torch.allclose(dots.abs(), torch.ones_like(dots), atol=1e-6), (s.name, dots)
            v = v * dots.sign()
        s.v = v

    def effective(self, s: Site) -> Tensor:
        """W as the model evaluates it now."""
        if s.value is None:
            return s.w
        change = s.value @ s.v.T  # type: ignore[union-attr]
        return s.w + (change if self.form == "right" else s.u @ change)

    def _show(self) -> None:
        with torch.no_grad():
            for s in self.sites:
                w = self.effective(s)
                s.module.weight.copy_(w.T if s.transposed else w)

    def fold(self) -> None:
        """W = decay W + U S V^T, S = 0."""
        for s in self.sites:
            if s.value is not None:
                s.w = self.effective(s) - (1 - self.decay) * s.w
                s.value = torch.zeros_like(s.value)
        self.decay = 1.0
        self._show()

    def _refresh(self, window: int) -> None:
        self.fold()
        self._draw_u(window)
        for number, s in enumerate(self.sites):
            if self.form == "full":  # no bases, so nothing to refresh
                continue
            if self.keep == "reset":
                s.state = {}
            old = s.v
            assert s.seen is not None and old is not None
            self._set_v(number, s.seen, window)
            if self.form == "right" and "m" in s.state and self.rule != "adam":
                s.state["m"] = s.state["m"] @ old.T @ s.v  # type: ignore[operator]

    # evaluation

    def _z(self, s: Site, part: Micro, k: int) -> Tensor:
        """Noise (rows, columns) of query k: element = row * columns + column."""
        known = (s.source, id(part), k)
        if known not in self._noise:
            columns = self.rank if self.form == "core" else s.m
            rng = make_rng(self.seed, self.steps * self.queries + k)
            stream, parts = NOISE_PURPOSE << 28 | s.source, []
            for example in part.example[part.noisy].unique_consecutive().tolist():
                at = part.position[part.noisy & (part.example == example)]
                most = (int(at.max()) + 1) * columns
                z = normals(rng, stream, most, start=example * 2**20 * columns)
                parts.append(z.view(-1, columns)[at])
            self._noise[known] = torch.cat(parts).double()
        return self._noise[known]

    @contextmanager
    def _hooked(self, hook: Callable[[Site, Tensor, Tensor], Tensor | None]) -> Any:
        def bind(s: Site) -> Any:
            return lambda _, args, y: hook(s, args[0], y)

        handles = [s.module.register_forward_hook(bind(s)) for s in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _clean(self, part: Micro, loss: Any) -> Tensor:
        flat = part.noisy.flatten()

        def keep(s: Site, x: Tensor, y: Tensor) -> None:
            x = x.reshape(-1, s.n)[flat]
            norm = x.norm(dim=1, keepdim=True)
            s.rows.append(torch.where(norm > 0, x / norm, 0.0))
            s.norms.append(norm)

        with torch.no_grad(), self._hooked(keep):
            return loss(self.model, part.batch)

    def _query(self, part: Micro, loss: Any, k: int) -> Tensor:
        flat = part.noisy.flatten().nonzero()[:, 0]

        def add(s: Site, x: Tensor, y: Tensor) -> Tensor | None:
            if s.source != s.index:
                return None
            z = self._z(s, part, k)
            if self.form == "core":
                z = math.sqrt(s.m / self.rank) * z @ s.u.T  # type: ignore[union-attr]
            out = y.reshape(-1, s.m).clone()
            out[flat] += self.eps * s.norms[-1] * z
            return out.view(y.shape)

        with torch.no_grad(), self._hooked(add):
            return loss(self.model, part.batch)

    def _credits(self, part: Micro, d: Tensor) -> Tensor:
        """What each noisy row is credited with, (K, rows); before any division."""
        example, token = part.noisy.nonzero(as_tuple=True)
        if d.dim() == 2:
            return d[:, example]
        out = torch.zeros(len(d), len(example), dtype=d.dtype)
        for i, (b, t) in enumerate(zip(example.tolist(), token.tolist(), strict=True)):
            for s in range(t, d.shape[2]):
                same = part.example[b, s] == part.example[b, t]
                if same and part.scored[b, s]:
                    distance = int(part.position[b, s] - part.position[b, t])
                    out[:, i] += self.discount**distance * d[:, b, s]
        return out

    def step(self, parts: Sequence[Micro], loss: Any) -> float:
        """loss(model, batch) -> (B,) or (B, T), read where scored. Returns the clean mean."""
        window, rest = divmod(self.steps, self.refresh_every)
        if self.steps and not rest:
            self._refresh(window)
        self._show()
        self._noise.clear()
        for s in self.sites:
            s.rows, s.norms = [], []
        clean, credits, counted, scored_credit = [], [], 0, []
        for part in parts:
            base = self._clean(part, loss)
            d = torch.stack([self._query(part, loss, k) - base for k in range(self.queries)])
            own = self._credits(part, d)
            credits.append(own)
            if base.dim() == 1:
                clean.append(base)
                scored_credit.append(d.flatten())
            else:
                clean.append(base[part.scored])
                scored_credit.append(own[:, part.scored[part.noisy]].flatten())
            counted += clean[-1].numel()
        everything = torch.cat(scored_credit)
        scale = self.eps
        if self.rule in ("norm", "muon", "adam"):
            by_token = base.dim() == 2
            scale = float(everything.square().mean().sqrt() if by_token else everything.std())
        weight = torch.cat(credits, 1) / scale / (self.queries * counted)
        for number, s in enumerate(self.sites):
            units = torch.cat(s.rows)
            if self.form != "full":
                if s.v is None:
                    self._set_v(number, units, 0)
                s.seen = torch.cat([*([] if s.seen is None else [s.seen]), units])
                s.seen = s.seen[-4 * self.rank :]
            self._update(s, self._estimate(s, weight, parts, units))
        self.decay *= 1 - self.lr * self.weight_decay if self.form != "full" else 1.0
        self.steps += 1
        self._show()
        return float(torch.cat(clean).mean())

    def _estimate(self, s: Site, weight: Tensor, parts: Sequence[Micro], units: Tensor) -> Tensor:
        """sum over queries and rows of w z a^T, without sqrt(m / r)."""
        a = units if self.form == "full" else units @ s.v  # type: ignore[operator]
        z = [torch.cat([self._z(s, part, k) for part in parts]) for k in range(self.queries)]
        return torch.einsum("kr,krm,rn->mn", weight, torch.stack(z), a)

    # rules

    def _update(self, s: Site, h: Tensor) -> None:
        """h: the estimate without sqrt(m / r)."""
        g = math.sqrt(s.m / self.rank) * h if self.form == "core" else h
        state = s.state
        if self.rule in ("sgd", "norm"):
            change = g
        elif self.rule == "momentum":
            change = state["m"] = self.momentum * state.get("m", 0) + g
        elif self.rule == "muon":
            state["m"] = self.momentum * state.get("m", 0) + (1 - self.momentum) * g
            change = 0.2 * math.sqrt(max(s.m, s.n)) * newton_schulz(state["m"])
        else:
            b1, b2 = self.betas
            t = state["t"] = state.get("t", 0) + 1
            m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * h
            v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * h * h
            unit = {
                "core": math.sqrt(s.m * s.n) / self.rank,
                "right": math.sqrt(s.n / self.rank),
                "full": 1.0,
            }[self.form]
            change = unit * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.adam_eps)
        shrink = 1 - self.lr * self.weight_decay
        if self.form == "full":
            s.w = shrink * s.w - self.lr * change
        else:
            before = torch.zeros_like(change) if s.value is None else s.value
            s.value = shrink * before - self.lr * change


def newton_schulz(m: Tensor) -> Tensor:
    """Muon's five steps on one matrix."""
    if m.shape[0] > m.shape[1]:
        return newton_schulz(m.T).T
    x = m / (m.norm() + 1e-12)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x
