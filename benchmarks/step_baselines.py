"""What a step is compared with: the loops of public code, and what 30 lines of torch can do.

Each is a function of the model that returns a call, one two-sided step with a single query (the
composed side path: any number of them). ``losses(copies)`` evaluates the batch so many times over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[], Tensor]
Losses = Callable[[int], Tensor]
LR, EPS = 1e-6, 1e-3


def eager_mezo(model: nn.Module, losses: Losses, rank: int) -> Call:
    """W += eps z, -2 eps z, eps z, and the update, z drawn again each time."""
    generator = torch.Generator(next(model.parameters()).device)

    def move(scale: float | Tensor, seed: int) -> None:
        generator.manual_seed(seed)
        for p in model.parameters():
            z = torch.empty_like(p).normal_(generator=generator)
            p.add_(scale * z)

    return _in_place(move, losses)


def eager_subzero(model: nn.Module, losses: Losses, rank: int) -> Call:
    """The same with z = mu U Z V^T, formed in full and written: the paper's loop in torch."""
    return _subzero(model, losses, rank, lambda p, u, z, v, by: p.add_(by * (u @ z @ v.T)))


def addmm_subzero(model: nn.Module, losses: Losses, rank: int) -> Call:
    """The same by ``addmm_``, which forms no noise of W's size."""
    return _subzero(model, losses, rank, lambda p, u, z, v, by: p.addmm_(u @ (by * z), v.T))


def _subzero(model: nn.Module, losses: Losses, rank: int, write: Callable[..., Tensor]) -> Call:
    generator = torch.Generator(next(model.parameters()).device)
    bases = _bases(model, rank)

    def move(scale: float | Tensor, seed: int) -> None:
        generator.manual_seed(seed)
        for p in model.parameters():
            if p not in bases:
                z = torch.empty_like(p).normal_(generator=generator)
                p.add_(scale * z)
                continue
            u, v, mu = bases[p]
            z = torch.empty(u.shape[1], v.shape[1], dtype=p.dtype, device=p.device)
            write(p, u, z.normal_(generator=generator), v, scale * mu)

    return _in_place(move, losses)


def _in_place(move: Callable[[float | Tensor, int], None], losses: Losses) -> Call:
    seed = 0

    def step() -> Tensor:
        nonlocal seed
        seed += 1
        move(EPS, seed)
        plus = losses(1).mean()
        move(-2 * EPS, seed)
        minus = losses(1).mean()
        move(EPS, seed)
        move(-LR * (plus - minus) / (2 * EPS), seed)
        return (plus + minus) / 2

    return step


def _bases(model: nn.Module, rank: int) -> dict[nn.Parameter, tuple[Tensor, Tensor, float]]:
    """U, V and mu of every matrix."""
    found = {}
    for p in model.parameters():
        if p.dim() == 2:
            u, v = (torch.linalg.qr(p.new_empty(n, rank).float().normal_())[0] for n in p.shape)
            found[p] = (u.to(p.dtype), v.to(p.dtype), math.sqrt(p.numel()) / rank)
    return found


class Composed:
    """W + U C V^T evaluated by cuBLAS calls, all groups in one batch, cores in one tensor.

    What a good engineer writes in thirty lines: linears and embeddings get another forward with
    two small products more; biases and norms are not trained.
    """

    def __init__(self, model: nn.Module, losses: Losses, rank: int, queries: int = 1) -> None:
        self.model, self.losses, self.queries = model, losses, queries
        bases = _bases(model, rank)
        self.bases = {id(p): (i, *bases[p][:2]) for i, p in enumerate(bases)}
        first = next(iter(bases))
        self.mu = torch.tensor([mu for *_, mu in bases.values()], device=first.device)
        self.mu = self.mu[:, None, None, None]
        self.value = torch.zeros(len(bases), 1, rank, rank, device=first.device)
        signs = torch.tensor([1.0, -1.0], device=first.device)
        self.signs = signs[:, None, None]
        self.cores = first.new_zeros(len(bases), 2 * queries, rank, rank)
        self.z = self.value.new_zeros(len(bases), queries, 1, rank, rank)

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        i, u, v = self.bases[id(module.weight)]
        core = self.cores[i]
        y = F.linear(x, module.weight, module.bias)
        inner = (x.reshape(-1, x.shape[-1]) @ v).view(core.shape[0], -1, v.shape[1])
        inner = torch.bmm(inner, core.mT).view(-1, u.shape[1])
        return torch.addmm(y.view(-1, y.shape[-1]), inner, u.T).view(y.shape)

    def embedding(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        i, u, v = self.bases[id(module.weight)]
        core = self.cores[i]
        inner = torch.bmm(u[ids].view(core.shape[0], -1, u.shape[1]), core)
        return F.embedding(ids, module.weight) + (inner @ v.T).view(*ids.shape, -1)

    @contextmanager
    def attached(self) -> Iterator[None]:
        # not OPT's positions, whose class has a forward of its own
        modules = [m for m in self.model.modules() if type(m) in (nn.Linear, nn.Embedding)]
        for m in modules:
            call = self._linear_forward if isinstance(m, nn.Linear) else self._embedding_forward
            m.forward = call(m)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for m in modules:
                del m.forward  # type: ignore[misc]

    def _linear_forward(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        return MethodType(lambda m, x: self.linear(m, x), module)

    def _embedding_forward(self, module: nn.Embedding) -> Callable[[Tensor], Tensor]:
        return MethodType(lambda m, ids: self.embedding(m, ids), module)

    def step(self) -> Tensor:
        """One step; ``attached`` while it is made or captured."""
        self.z.normal_()
        noise = (EPS * self.mu[:, None] * self.z * self.signs).flatten(1, 2)
        self.cores.copy_(self.value + noise)
        losses = self.losses(2 * self.queries).view(self.queries, 2, -1).mean(2)
        rho = (losses[:, 0] - losses[:, 1]) / (2 * EPS * self.queries)
        update = (rho[:, None, None, None] * self.z).sum(1)
        self.value.sub_(LR * self.mu * update)
        return losses.mean()
