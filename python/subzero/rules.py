"""From losses to an update: rho, and what it does to cores and dense values.

Every quantity stays on the device. ``finite`` masks the step: where a loss is not finite, each
factor becomes the one that changes nothing, so a skipped step leaves every bit as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .spaces import Space


@dataclass(frozen=True)
class Hyper:
    """What the param group says now."""

    lr: float
    momentum: float
    betas: tuple[float, float]
    adam_eps: float


State = dict[str, Tensor]


def directional(losses: Tensor, eps: float, two_sided: bool, rule: str) -> tuple[Tensor, Tensor]:
    """rho per query (K,) fp32, zeros where the step is skipped, and ``finite`` (0-d bool).

    losses (G,): +0, -0, +1, -1, ... or baseline, 0, 1, .... rho_k = (l_k+ - l_k-) / (2 eps) or
    (l_k - l_0) / eps; the norm rule divides by the (unbiased) std of the losses instead.
    """
    finite = torch.isfinite(losses).all()
    if two_sided:
        difference, spread = losses[0::2] - losses[1::2], losses
    else:
        difference, spread = losses[1:] - losses[0], losses[1:]
    if rule == "norm":
        rho = difference / spread.std().clamp_min(1e-12)
    else:
        rho = difference / (2 * eps if two_sided else eps)
    return torch.where(finite, rho, torch.zeros_like(rho)), finite


def sgd(space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper) -> None:
    """value -= lr g, g = sum_k weight[k] mu z_k; weight = rho / K."""
    space.add_noise_(space.value, -h.lr * weight, rng)


def momentum(
    space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper
) -> None:
    """As torch.optim.SGD: buffer = momentum buffer + g; value -= lr buffer."""
    buffer = _buffer(space, state, "momentum")
    buffer.mul_(torch.where(finite, h.momentum, 1.0))
    space.add_noise_(buffer, weight, rng)
    space.value.sub_(buffer * torch.where(finite, h.lr, 0.0))


def adam(space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper) -> None:
    """Moments of sum_k weight[k] z_k; value -= lr mu m_hat / (sqrt(v_hat) + adam_eps).

    The moments leave mu out, so that lr means a change per weight (arXiv 1412.6980).
    """
    first, second = _buffer(space, state, "exp_avg"), _buffer(space, state, "exp_avg_sq")
    count = state.setdefault("updates", torch.zeros((), dtype=torch.float64, device=rng.device))
    count += finite
    g = torch.zeros_like(space.value)
    space.add_noise_(g, weight, rng, scaled=False)
    beta1, beta2 = h.betas
    first.lerp_(g, torch.where(finite, 1 - beta1, 0.0).to(g.dtype))
    second.lerp_(g * g, torch.where(finite, 1 - beta2, 0.0).to(g.dtype))
    done = count.clamp_min(1)
    m_hat = first / (1 - beta1**done).to(g.dtype)
    v_hat = second / (1 - beta2**done).to(g.dtype)
    step = space.scale * m_hat / (v_hat.sqrt() + h.adam_eps)
    space.value.sub_(step * torch.where(finite, h.lr, 0.0))


RULES: dict[str, Callable[[Space, State, Tensor, Tensor, Tensor, Hyper], None]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "norm": sgd,
}


def _buffer(space: Space, state: State, name: str) -> Tensor:
    return state.setdefault(name, torch.zeros_like(space.value))
