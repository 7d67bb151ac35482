"""From the losses of a step of activation noise to the weight of every noisy row.

    w[k, b] = (l[k, b] - l_b) / s

s is eps for rules sgd and momentum, else the spread of all differences of the step. The estimate
of a gradient is the mean over queries and examples (tokens) of w z (x / |x|)^T, so what a space
gets is w / (K examples) for each row, or w / (K scored tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .micros import Micro
from .options import Options
from .rows import Grid

SPREAD_RULES = ("norm", "muon", "adam")


@dataclass
class Outcome:
    """A step's result: the clean loss, whether every loss was finite, and each row's weight.

    weight (K, entries) and ids (entries,) by axis, micro-batches one after another; zero for
    entries that are no row.
    """

    loss: Tensor
    finite: Tensor
    weight: dict[str, Tensor]
    ids: dict[str, Tensor]

    def skipped(self) -> Outcome:
        """The same of a step that is skipped whatever its losses are."""
        none = {axis: torch.zeros_like(some) for axis, some in self.weight.items()}
        return Outcome(self.loss, torch.zeros_like(self.finite), none, self.ids)


def weigh(micros: list[Micro], eps: float | Tensor, options: Options) -> Outcome:
    """The weight of every noisy row: its difference over s, and over what is averaged."""
    queries, by_token = options.queries, micros[0].by_token
    count: int | Tensor
    if by_token:
        count = _joined([m.valid.sum()[None] for m in micros]).sum()
        loss = _joined([m.clean.sum()[None] for m in micros]).sum() / count
        credit = [_credit_of_tokens(m, options.discount) for m in micros]
        squares = [
            torch.where(m.valid, _at_read(c, m), 0.0).square().sum()[None]
            for c, m in zip(credit, micros, strict=True)
        ]
        spread = (_joined(squares).sum() / (queries * count)).sqrt()
        whole = [m.differences.sum(2) for m in micros]
    else:
        count = sum(m.examples for m in micros)
        loss = _joined([m.clean for m in micros]).mean()
        whole = [m.differences for m in micros]
        if options.rule in SPREAD_RULES and queries * count == 1:
            raise ValueError(
                f"queries: expected at least two differences a step with rule={options.rule!r}, "
                "which divides by their spread, got one query of one example; raise queries or "
                "the batch, or take rule='sgd'"
            )
        several = queries * count > 1
        spread = _joined(whole, 1).std() if several else loss.new_ones(())
        credit = [
            w[..., None].expand(*w.shape, m.live.shape[1])
            for w, m in zip(whole, micros, strict=True)
        ]
    by = (spread.clamp_min(1e-12) if options.rule in SPREAD_RULES else eps) * queries * count
    finite = _finite(micros)

    def weights(parts: list[Tensor], live: list[Tensor]) -> Tensor:
        some = _joined([c.flatten(1) for c in parts], 1)
        counts = _joined([each.flatten() for each in live]) & finite
        return torch.where(counts, some / by, 0.0)

    weight = {"main": weights(credit, [m.live for m in micros])}
    ids = {"main": _joined([m.ids.flatten() for m in micros])}
    sources: list[tuple[Tensor, Grid]] = [
        (w, m.encoder) for w, m in zip(whole, micros, strict=True) if m.encoder
    ]
    if sources:
        parts = [w[..., None].expand(*w.shape, g.real.shape[1]) for w, g in sources]
        weight["encoder"] = weights(parts, [g.real for _, g in sources])
        ids["encoder"] = _joined([g.ids.flatten() for _, g in sources])
    return Outcome(loss, finite, weight, ids)


def _finite(micros: list[Micro]) -> Tensor:
    """Whether all losses are, there are any, and every micro-batch reads what fits."""
    finite = _joined([m.valid.any()[None] for m in micros]).any()
    for m in micros:
        # the difference of losses that are not finite is not either
        finite = finite & torch.isfinite(m.differences).all()
        if m.fits is not None:
            finite = finite & m.fits
    return finite


def _credit_of_tokens(micro: Micro, discount: float) -> Tensor:
    """(K, B, entries): each noisy row's difference, and discount^distance times later ones.

    A discount above 0 takes a few temporary tensors (B, entries, P), one weight for each pair.
    """
    d, grid = micro.differences, micro.grid
    if discount == 0:
        if not micro.everywhere or micro.index is None:
            return d
        spread = d.new_zeros(*d.shape[:2], grid.real.shape[1])
        return spread.scatter_add_(2, micro.index.expand(len(d), -1, -1), d)
    position, example = grid.position.to(d.dtype), grid.example
    distance = micro.at_read(position)[:, None, :] - micro.at_entries(position)[:, :, None]
    same = micro.at_read(example)[:, None, :] == micro.at_entries(example)[:, :, None]
    reached = same & (distance >= 0) & micro.valid[:, None, :] & micro.live[:, :, None]
    decay = torch.where(reached, discount**distance, 0.0)
    return torch.einsum("kbs,bts->kbt", d, decay)


def _at_read(credit: Tensor, micro: Micro) -> Tensor:
    """(K, B, entries) at what is read."""
    if not micro.everywhere or micro.index is None:
        return credit
    return credit.gather(2, micro.index.expand(len(credit), -1, -1))


def _joined(parts: list[Tensor], axis: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
