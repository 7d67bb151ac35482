"""A whole model's matrices, validated once, for loops that perturb the same tensors many times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, validate
from .backends import choose, kind_of, load


class PerturbPlan:
    """What :func:`perturb_plan` returns: ``perturb_many_`` without the repeated validation."""

    def __init__(
        self,
        ws: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        streams: Sequence[int],
    ) -> None:
        self._given = list(ws), list(us), list(vs)
        self._streams = list(streams)
        self._lead = validate.check_perturb_plan(*self._given, streams=self._streams)
        self._chosen_by = "", False, ""
        if self._lead is not None:
            lead = self._lead
            kind = kind_of(lead.dtype, lead.numel(), us[0].shape[1])
            self._chosen_by = lead.device.type, lead.dtype is torch.float64, kind
        # Aliases of our own: a later `w.data = ...` cannot change the shapes that were checked.
        self._ws, self._us, self._vs = ([t.detach() for t in tensors] for tensors in self._given)
        self._all_given = [t for tensors in self._given for t in tensors]
        self._addresses = self._given_addresses()
        self._prepared: dict[str, Callable[..., None]] = {}
        self._storages = {t.untyped_storage().data_ptr() for t in self._ws}

    def _given_addresses(self) -> list[int]:
        # Most of what a call costs the host: 726 tensors for the 242 matrices of OPT-13B.
        return list(map(Tensor.data_ptr, self._all_given))

    def perturb_(self, coeff: Tensor, rng: Tensor, rounding: str = "nearest") -> None:
        """W += mu sum_k coeff[k] U Z_(draw + k) V^T on every matrix of the plan.

        Fastest under ``torch.no_grad()``: with grad mode on, everything is validated again.

        Args:
            coeff: fp32 (K,), K >= 1, on the matrices' device.
            rng: int64 (2,), [seed, draw], on the matrices' device.
            rounding: "nearest" or "stochastic".

        Raises:
            ValueError, TypeError: a wrong argument, or a tensor that has moved or was cast since
                the plan was made.
        """
        if torch.compiler.is_compiling():
            # A traced call goes through the op, whose fake checks everything once, while tracing.
            ws, us, vs = self._given
            ops.perturb_many_(ws, us, vs, coeff, rng, streams=self._streams, rounding=rounding)
            return
        if self._given_addresses() != self._addresses:
            raise ValueError(
                "plan: expected the tensors it was made for, got one that has moved or was cast "
                "since; make a new perturb_plan"
            )
        validate.check_perturb_plan_call(self._lead, coeff, rng, rounding=rounding)
        if torch.is_grad_enabled() or self._shares_storage(coeff, rng):
            validate.check_perturb_many_(*self._given, coeff, rng, streams=self._streams)
        if self._lead is None:
            return
        chosen = choose("perturb_many_", *self._chosen_by)
        self._prepare(chosen.backend)(coeff, rng, rounding=rounding)

    def _prepare(self, backend: str) -> Callable[..., None]:
        """What runs the plan on a backend: its own plan, which takes the addresses once, if any."""
        if backend not in self._prepared:
            tensors = self._ws, self._us, self._vs
            module: Any = load(backend)[0]
            if hasattr(module, "perturb_plan"):
                self._prepared[backend] = module.perturb_plan(*tensors, self._streams).perturb_
            else:
                self._prepared[backend] = functools.partial(
                    module.perturb_many_, *tensors, streams=self._streams
                )
        return self._prepared[backend]

    def _shares_storage(self, coeff: Tensor, rng: Tensor) -> bool:
        return not self._storages.isdisjoint(
            (coeff.untyped_storage().data_ptr(), rng.untyped_storage().data_ptr())
        )


def perturb_plan(
    ws: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], streams: Sequence[int]
) -> PerturbPlan:
    """Validate the arguments of ``perturb_many_`` once; ``plan.perturb_(coeff, rng)`` runs it.

    The plan keeps references to the tensors, copies nothing, and raises when one of them has moved.

    Args:
        ws, us, vs, streams: as in :func:`subzero_kernels.perturb_many_`.

    Raises:
        ValueError, TypeError: as the op itself.
    """
    return PerturbPlan(ws, us, vs, streams)
