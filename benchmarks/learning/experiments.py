"""Changes to the estimator under trial; none is part of the package.

Each is an option of a method in methods.py: pool, every, control, queries_end, batch_end.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subzero import LogitsLoss
from subzero.activation_weights import ActivationWeights
from subzero.forms import CreditSpace
from subzero_kernels import PURPOSE_ACTIVATION, add_noise_, noise_outer_, stream_id


def pool_neighbours(space: CreditSpace, reach: int) -> None:
    """Estimate a block's gradient as the mean over its neighbours' noise: biased, less variance.

    Gradients of the residual stream agree from block to block. Forms right and full, credit block.
    """
    streams = sorted({tap.stream for tap in space.taps})

    def add_noise_pooled_(flat: Tensor, coeff: Tensor, rng: Tensor) -> None:
        for tap, out in zip(space.taps, space.views(flat), strict=True):
            weight, kept, ids = space.rows_of(tap, coeff)
            at = streams.index(tap.stream)
            near = streams[max(0, at - reach) : at + reach + 1]
            weight = (weight / len(near)).contiguous()
            for stream in near:
                noise_outer_(out, weight, kept, ids, rng, stream=stream, beta=1.0)

    space.add_noise_ = add_noise_pooled_


def share_noise(weights: ActivationWeights, every: int) -> None:
    """Noise at fewer places: on every n-th block from the top, crediting those below it too.

    The gradient of the stream behind block b stands for that of the ``every - 1`` blocks below it.
    """
    sources = sorted({tap.credit.source for tap in weights.taps})
    noisy = sources[::-1][::every]
    for tap in weights.taps:
        source = min(s for s in noisy if s >= tap.credit.source)
        tap.credit = replace(tap.credit, source=source)
        tap.stream = stream_id(PURPOSE_ACTIVATION, source)
    weights._draw_carriers(0)


class HeadControl:
    """The head's exact gradient at the last hidden state as a control variate of every block.

    With g_i that gradient of example i, the part of the losses' differences that z . g_i explains
    in each block (least squares over queries and examples, all blocks together) is taken out of
    the noise and put back as its expectation. Classification with label words, left padding.
    """

    def __init__(self, weights: ActivationWeights, model: nn.Module, objective: LogitsLoss) -> None:
        self.space, self.objective = weights.space, objective
        self.norm = model.get_decoder().norm
        self.head = model.get_output_embeddings().weight
        self.batch: dict[str, Tensor] = {}
        self.hidden: Tensor | None = None
        self.hook = self.norm.register_forward_pre_hook(self._keep)
        self.space.add_noise_ = self.add_noise_

    def begin(self, batch: dict[str, Tensor]) -> None:
        """Before a step: its first forward is the clean one."""
        self.batch, self.hidden = batch, None

    def _keep(self, module: nn.Module, args: Any) -> None:
        if self.hidden is None:
            self.hidden = args[0][:, -1].detach()

    def gradient(self) -> Tensor:
        """(examples, width): of each example's loss by its last hidden state."""
        assert self.hidden is not None
        with torch.enable_grad():
            hidden = self.hidden.clone().requires_grad_()
            logits = F.linear(self.norm(hidden), self.head[self.objective.tokens])
            loss = self.objective.fn(logits[:, None], self.batch).sum()
            return torch.autograd.grad(loss, hidden)[0]

    def add_noise_(self, flat: Tensor, coeff: Tensor, rng: Tensor) -> None:
        """As CreditSpace.add_noise_, with the control variate in it."""
        gradient = self.gradient().to(coeff.dtype)
        queries, count = coeff.shape
        every = torch.arange(queries, device=coeff.device)
        heads, along = {}, []
        for tap in self.space.taps:
            if not tap.credit.noisy:
                continue
            _, _, ids = self.space.rows_of(tap, coeff)
            head = gradient * tap._norm[:, None]
            if tap.carrier is not None:
                head = head @ tap.carrier.to(head.dtype)
            noise = head.new_zeros(queries, count, head.shape[1])
            ones = head.new_ones(queries, count)
            add_noise_(noise, ones, every, ids, rng, stream=tap.stream)
            heads[tap.stream] = len(along), head
            along.append((noise * head).sum(2).flatten())
        predictors = torch.stack(along, 1)
        share = torch.linalg.lstsq(predictors, coeff.flatten()[:, None]).solution
        rest = (coeff.flatten() - (predictors @ share)[:, 0]).view_as(coeff)
        for tap, out in zip(self.space.taps, self.space.views(flat), strict=True):
            credit = tap.credit
            spread = math.sqrt(credit.m / credit.rank) if credit.form == "core" else 1.0
            weight, kept, ids = self.space.rows_of(tap, rest)
            weight = (spread * weight).contiguous()
            noise_outer_(out, weight, kept, ids, rng, stream=tap.stream, beta=1.0)
            at, head = heads[tap.stream]
            out.add_(spread * queries * share[at] * (head.T @ kept))


class Schedule:
    """Queries and batch that change in training, geometrically, at the parts of a run."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.last = {
            name: options.pop(f"{name}_end")
            for name in ("queries", "batch")
            if f"{name}_end" in options
        }
        self.first = {name: options.get(name, 16) for name in self.last}

    def at(self, share: float) -> dict[str, int]:
        """What changes, when this share of the run is over."""
        return {
            name: round(first * (self.last[name] / first) ** share)
            for name, first in self.first.items()
        }
