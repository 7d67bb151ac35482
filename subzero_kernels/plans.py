"""A whole model's matrices, validated once, for loops that perturb the same tensors many times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, validate
from .backends import choose


class PerturbPlan:
    """What :func:`perturb_plan` returns: ``perturb_many_`` without the repeated validation."""

    def __init__(
        self,
        ws: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        streams: Sequence[int],
    ) -> None:
        self._ws, self._us, self._vs, self._streams = list(ws), list(us), list(vs), list(streams)
        self._lead = validate.check_perturb_plan(
            self._ws, self._us, self._vs, streams=self._streams
        )
        self._layout = self._fingerprint()

    def _fingerprint(self) -> list[tuple[object, ...]]:
        return [
            (t.data_ptr(), t.dtype, t.shape, t.stride())
            for tensors in (self._ws, self._us, self._vs)
            for t in tensors
        ]

    def perturb_(self, coeff: Tensor, rng: Tensor, rounding: str = "nearest") -> None:
        """W += mu sum_k coeff[k] U Z_(draw + k) V^T on every matrix of the plan.

        Args:
            coeff: fp32 (K,), K >= 1, on the matrices' device.
            rng: int64 (2,), [seed, draw], on the matrices' device.
            rounding: "nearest" or "stochastic".

        Raises:
            ValueError, TypeError: a wrong argument, or a matrix that was moved, reshaped or cast
                since the plan was made.
        """
        if torch.compiler.is_compiling():
            # A traced call goes through the op, whose fake repeats the whole check once, at trace
            # time.
            ops.perturb_many_(
                self._ws, self._us, self._vs, coeff, rng, streams=self._streams, rounding=rounding
            )
            return
        if self._lead is None:
            return
        if self._fingerprint() != self._layout:
            raise ValueError(
                "plan: expected the tensors it was made for, got one that has moved or changed its "
                "shape or dtype since; make a new perturb_plan"
            )
        validate.check_perturb_plan_call(self._ws, coeff, rng, rounding=rounding)
        chosen = choose("perturb_many_", self._lead.device.type, self._lead.dtype is torch.float64)
        chosen.function(
            self._ws, self._us, self._vs, coeff, rng, streams=self._streams, rounding=rounding
        )


def perturb_plan(
    ws: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], streams: Sequence[int]
) -> PerturbPlan:
    """Validate the arguments of ``perturb_many_`` once; ``plan.perturb_(coeff, rng)`` runs it.

    The plan keeps references to the tensors, copies nothing, and notices when one of them is moved,
    reshaped or cast.

    Args:
        ws, us, vs, streams: as in :func:`subzero_kernels.perturb_many_`.

    Raises:
        ValueError, TypeError: as the op itself.
    """
    return PerturbPlan(ws, us, vs, streams)
