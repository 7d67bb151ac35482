"""From losses to an update: rho, and what it does to cores and dense values.

Every quantity stays on the device. ``finite`` masks the step: where a loss is not finite, each
factor becomes the one that changes nothing, so a skipped step leaves every bit as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from subzero_kernels.backends.reference import full_precision

from .hyper import Hyper
from .spaces import Space

State = dict[str, Tensor]


def directional(
    losses: Tensor, eps: float | Tensor, two_sided: bool, rule: str
) -> tuple[Tensor, Tensor]:
    """rho per query (K,) fp32, zeros where the step is skipped, and ``finite`` (0-d bool).

    losses (G,): +0, -0, +1, -1, ... or baseline, 0, 1, .... rho_k = (l_k+ - l_k-) / (2 eps) or
    (l_k - l_0) / eps; rules norm and muon divide by the (unbiased) std of the losses instead.
    """
    finite = torch.isfinite(losses).all()
    if two_sided:
        difference, spread = losses[0::2] - losses[1::2], losses
    else:
        difference, spread = losses[1:] - losses[0], losses[1:]
    if rule in ("norm", "muon"):
        rho = difference / spread.std().clamp_min(1e-12)
    else:
        rho = difference / (2 * eps if two_sided else eps)
    return torch.where(finite, rho, torch.zeros_like(rho)), finite


def sgd(space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper) -> None:
    """value -= lr g, g = sum_k weight[k] mu z_k; weight = rho / K."""
    space.descend_(-h.lr * weight, rng)


def momentum(
    space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper
) -> None:
    """As torch.optim.SGD: buffer = momentum buffer + g; value -= lr buffer."""
    buffer = _buffer(space, state, "momentum")
    buffer.mul_(where(finite, h.momentum, 1.0, buffer.dtype))
    space.add_noise_(buffer, weight, rng)
    space.subtract_(buffer * where(finite, h.lr, 0.0, buffer.dtype))


def adam(space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper) -> None:
    """Moments of sum_k weight[k] z_k; value -= lr mu m_hat / (sqrt(v_hat) + adam_eps).

    The moments leave mu out, so that lr means a change per weight (arXiv 1412.6980).
    """
    first, second = _buffer(space, state, "exp_avg"), _buffer(space, state, "exp_avg_sq")
    count = state.setdefault("updates", torch.zeros((), dtype=torch.float64, device=rng.device))
    count += finite
    g = space.zeros()
    space.add_noise_(g, weight, rng, scaled=False)
    beta1, beta2 = h.betas
    first.lerp_(g, where(finite, 1 - beta1, 0.0, g.dtype))
    second.lerp_(g * g, where(finite, 1 - beta2, 0.0, g.dtype))
    done = count.clamp_min(1)
    m_hat = first / (1 - beta1**done).to(g.dtype)
    v_hat = second / (1 - beta2**done).to(g.dtype)
    step = space.scale * m_hat / (v_hat.sqrt() + h.adam_eps)
    space.subtract_(step * where(finite, h.lr, 0.0, g.dtype))


def muon(space: Space, state: State, weight: Tensor, finite: Tensor, rng: Tensor, h: Hyper) -> None:
    """M = momentum M + (1 - momentum) g; value -= lr 0.2 sqrt(max(m, n)) X, X near orthogonal.

    X has M's singular vectors and singular values near 1, so that lr means a root-mean-square
    change per weight, about five times as large. Vectors move by lr 0.2 M / rms(M). No Nesterov.
    Source: K. Jordan et al., "Muon: an optimizer for hidden layers", 2024; the factor of Liu et
    al., arXiv 2502.16982.
    """
    buffer = _buffer(space, state, "momentum")
    buffer.mul_(where(finite, h.momentum, 1.0, buffer.dtype))
    space.add_noise_(buffer, (1 - h.momentum) * weight, rng)
    lr = where(finite, 0.2 * h.lr, 0.0, buffer.dtype)
    for members in _stacks(space.shapes):
        x = space.stack(buffer, members)
        if not space.width(members[0]):
            rms = x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
            space.subtract_stack_(members, x / rms, lr.expand(len(members)))
            continue
        space.subtract_stack_(members, orthogonalised(x), lr * space.roots(members))
    space.finish()


def orthogonalised(m: Tensor) -> Tensor:
    """Five Newton-Schulz steps on matrices (L, rows, columns), in their own precision.

    X = M / (|M|_F + 1e-12), then A = X X^T, X = P X with P = 3.4445 I - 4.7750 A + 2.0315 A A

    All P are polynomials of the first A. So for long matrices their product is found among small
    ones, the next A being P A P, and X is multiplied once. That takes products in full fp32: TF32
    would lose the small singular values.
    """
    x = m.mT if m.shape[-2] > m.shape[-1] else m
    if x.shape[-1] >= 4 * x.shape[-2]:
        with full_precision():
            x = _by_gram_matrix(x)
    else:
        x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)
        for _ in range(5):
            a = x @ x.mT
            x = torch.baddbmm(x, _polynomial(a), x, beta=3.4445)
    return x.mT if m.shape[-2] > m.shape[-1] else x


def _by_gram_matrix(m: Tensor) -> Tensor:
    a = m @ m.mT
    norm = a.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-12
    a = a / norm**2
    product = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand_as(a) / norm
    for i in range(5):
        p = _polynomial(a)
        product = torch.baddbmm(product, p, product, beta=3.4445)
        if i < 4:
            half = torch.baddbmm(a, p, a, beta=3.4445)
            a = torch.baddbmm(half, half, p, beta=3.4445)
    return product @ m


def _polynomial(a: Tensor) -> Tensor:
    """-4.7750 A + 2.0315 A A"""
    return torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)


def _stacks(shapes: Sequence[tuple[int, ...]], most: int = 1 << 26) -> Iterator[list[int]]:
    """Positions of equal shapes, so many together as hold ``most`` numbers."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(i)
    for shape, members in alike.items():
        size = max(1, most // math.prod(shape))
        for start in range(0, len(members), size):
            yield members[start : start + size]


RULES: dict[str, Callable[[Space, State, Tensor, Tensor, Tensor, Hyper], None]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "norm": sgd,
    "muon": muon,
}


def where(finite: Tensor, number: Tensor, otherwise: float, dtype: torch.dtype) -> Tensor:
    """``number`` (0-d) in a step that counts, else ``otherwise``: 0-d, and exact to ``dtype``."""
    return torch.where(finite, number.to(dtype), otherwise)


def _buffer(space: Space, state: State, name: str) -> Tensor:
    if name not in state:
        state[name] = space.zeros()
    return state[name]
