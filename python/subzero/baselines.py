"""MeZO, the method SubZero is measured against, on the same noise contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from subzero_kernels import PURPOSE_DENSE, make_rng, perturb_dense_, stream_id

from .hooks import eval_mode
from .losses import scalar_loss
from .objectives import LogitsLoss
from .plan import one_device


class MeZO(torch.optim.Optimizer):
    """Memory-efficient zeroth-order SGD, in place.

    One z ~ N(0, 1) as large as all parameters a step, regenerated wherever it is needed:

        W += eps z,    loss_plus
        W -= 2 eps z,  loss_minus        rho = (loss_plus - loss_minus) / (2 eps)
        W += (eps - lr rho) z            restored and updated in one pass

    The noise is the project's contract: purpose 1 (dense), the parameter's position in
    ``model.named_parameters()``, draw = step. Weights are restored by subtraction, so they drift by
    rounding, as in every implementation of this loop; in 16-bit that drift exceeds the updates.
    Source: "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333, algorithm 1.

    Args:
        model: the module whose parameters with requires_grad are trained, all on one device.
        lr: learning rate. eps: half the distance of the two evaluations. seed: of the noise.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-6, eps: float = 1e-3, seed: int = 0
    ) -> None:
        for name, value, good in (("lr", lr, lr >= 0), ("eps", eps, eps > 0)):
            if not good or value == float("inf"):
                bound = "above 0" if name == "eps" else "of at least 0"
                raise ValueError(f"{name}: expected a finite number {bound}, got {value!r}")
        trained = [(i, p) for i, p in enumerate(model.parameters()) if p.requires_grad]
        if not trained:
            raise ValueError(
                "model: expected at least one parameter with requires_grad=True, got none; "
                "unfreeze what should be trained with requires_grad_(True)"
            )
        device = one_device(p for _, p in trained)
        super().__init__([p for _, p in trained], {"lr": lr, "eps": eps})
        self.model = model
        self.seed = seed
        self.steps = 0
        self._streams = [stream_id(PURPOSE_DENSE, i) for i, _ in trained]
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def skipped(self) -> int:
        """How many steps were skipped because a loss was not finite."""
        return int(self._skipped)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, batch: Any, objective: LogitsLoss | Callable[[Any], Tensor] | None = None
    ) -> Tensor:
        """One step: two forwards, then the update.

        ``step(batch, objective)`` with a LogitsLoss, or with objective(batch) -> (examples,);
        ``step(closure)`` with closure() -> a scalar. The model runs in eval mode. A loss that is
        not finite restores the weights, and is counted in ``skipped``.

        Returns:
            0-d fp32 tensor on the device: the mean of both losses.
        """
        group = self.param_groups[0]
        lr, eps = group["lr"], group["eps"]
        at = 0.0  # where the weights stand, in units of z
        losses = []
        with eval_mode(self.model):
            try:
                for target in (eps, -eps):
                    self._move(target - at)
                    at = target
                    losses.append(self._loss(batch, objective))
            except BaseException:
                self._move(-at)
                raise
        plus, minus = losses
        rho = (plus - minus) / (2 * eps)
        finite = torch.isfinite(rho)
        self._move(torch.where(finite, -at - lr * rho, -at))
        self._skipped += ~finite
        self.steps += 1
        return ((plus + minus) / 2).float()

    def _loss(self, batch: Any, objective: Any) -> Tensor:
        if objective is None:
            return scalar_loss(batch()).to(self._skipped.device)
        loss = mean_loss(self.model, batch, objective).to(self._skipped.device)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def _move(self, coeff: Tensor | float) -> None:
        """W += coeff z, for all parameters."""
        device = self._skipped.device
        perturb_dense_(
            [p.detach() for p in self.param_groups[0]["params"]],
            torch.as_tensor(coeff, dtype=torch.float32, device=device).reshape(1),
            make_rng(self.seed, self.steps, device=device),
            streams=self._streams,
        )


def mean_loss(model: nn.Module, batch: Any, objective: Any) -> Tensor:
    """Mean over the examples, or over the scored tokens where the objective gives token losses.

    Args:
        objective: a LogitsLoss, or objective(batch) -> (examples,).

    Returns:
        0-d tensor, of the losses' dtype, with its graph where autograd is on.
    """
    if not isinstance(objective, LogitsLoss):
        return objective(batch).mean()
    batch = objective.prepare(model, batch)
    losses = objective(model, batch)
    return losses.mean() if losses.dim() == 1 else losses.sum() / objective.scored(batch).sum()
