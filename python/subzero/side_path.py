"""Modules evaluated as W + U C V^T, with W read-only.

Each module that owns a trained parameter gets a pre-hook and a hook. Between them a torch
function mode is active that recognises the parameter itself among the arguments of F.linear,
torch.addmm (Conv1D), F.embedding, F.layer_norm, F.rms_norm or, inside a norm, of any elementwise
function. So the module's class, attributes, forward (overridden or not) and parameters stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from subzero_kernels import lowrank_embedding, lowrank_linear

from .credit import Credit
from .hooks import Hooks
from .norms import normed, scaled
from .plan import Entry, is_norm, row_or_column_groups

_PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)


class GroupsDiffer(RuntimeError):
    """The groups of a step cannot share one forward of this model; the message says why."""


@dataclass
class LowRank:
    """W + U C_g V^T for one matrix: u (m', r), v (n', r), core (G, r, r) fp32."""

    entry: Entry | Credit
    u: Tensor
    v: Tensor
    core: Tensor
    used: bool = False


@dataclass
class DenseValue:
    """The values of one dense parameter: (G, n) fp32."""

    entry: Entry
    values: Tensor
    used: bool = False


class SidePath(TorchFunctionMode):
    """Evaluates the attached modules for ``groups`` groups along axis 0 of their inputs.

    ``rows`` is the number of examples of all groups together when there are several groups:
    an input whose leading axis is no multiple of it raises GroupsDiffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices: dict[int, LowRank] = {}
        self.dense: dict[int, DenseValue] = {}
        self.groups = 1
        self.rows = 1
        self._inside: list[nn.Module] = []
        self._norms: set[nn.Module] = set()
        self._shape: tuple[int, ...] = ()  # of the input of the norm that is being evaluated
        self._handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.linear: self._linear,
            torch.index_select: self._index_select,
            torch.addmm: self._addmm,
            F.embedding: self._embedding,
            F.layer_norm: self._layer_norm,
            F.rms_norm: self._rms_norm,
        }

    # attaching

    def attach(self, model: nn.Module, hooks: Hooks) -> None:
        """Hook every module that owns one of the tracked parameters."""
        for module in model.modules():
            if any(
                id(p) in self.matrices or id(p) in self.dense for p in module._parameters.values()
            ):
                if is_norm(module):
                    self._norms.add(module)
                hooks.add(module.register_forward_pre_hook, self._enter, prepend=True)
                hooks.add(module.register_forward_hook, self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._inside:
            self.__enter__()
        self._inside.append(module)
        if module in self._norms:
            self._shape = tuple(args[0].shape) if args else ()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside and self._inside[-1] is module:
            self._inside.pop()
            if not self._inside:
                self.__exit__(None, None, None)

    def leave_all(self) -> None:
        """After an interrupt, which runs no hook, leave the modules that were entered."""
        if self._inside:
            self._inside.clear()
            self.__exit__(None, None, None)

    # evaluating

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is None and self._inside and self._inside[-1] in self._norms:
            handler = self._elementwise(func)
        out = NotImplemented if handler is None else handler(*args, **kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out

    # Handlers take their arguments under torch's names: a model may pass them by keyword.

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        low, value = self.matrices.get(id(weight)), self.dense.get(id(bias))
        if low is None and value is None:
            return NotImplemented
        self._check_rows(input, low or value)
        bias = self._values(bias)
        if low is None:
            return _add_bias(F.linear(input, weight), bias)
        self._mark(low)
        if low.u.shape[0] != weight.shape[0]:
            return _grouped_linear(input, weight, bias, low)
        return _linear(input, weight, bias, low.u, low.v, low.core)

    def selects_rows(self, weight: Tensor) -> bool:
        """Whether a few outputs of a linear are its input times rows by ``torch.index_select``."""
        return True

    def _index_select(self, input: Tensor, dim: int, index: Tensor) -> Any:
        """Rows of a linear's weight (groups, k, n), or of its bias (groups, k), for heads.py."""
        low, value = self.matrices.get(id(input)), self.dense.get(id(input))
        if (low is None and value is None) or type(self._inside[-1]) is not nn.Linear:
            return NotImplemented
        if value is not None:
            return self._mark(value).values.index_select(1, index)
        assert low is not None
        self._mark(low)
        rows, v = _at_least_fp32(input.index_select(0, index)), _at_least_fp32(low.v)
        if low.u.shape[0] == input.shape[0]:
            return rows + _at_least_fp32(low.u.index_select(0, index)) @ low.core @ v.T
        change = (_at_least_fp32(low.u) @ low.core @ v.T).view(-1, *input.shape)
        return rows + change.index_select(1, index)

    def _addmm(
        self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Any:
        # y = x (W + U C V^T) + b is the linear of W^T + V C^T U^T
        low, value = self.matrices.get(id(mat2)), self.dense.get(id(input))
        if (low is None and value is None) or beta != 1 or alpha != 1:
            return NotImplemented
        self._check_rows(mat1, low or value)
        bias = self._values(input)
        if low is None:
            return _add_bias(mat1 @ mat2, bias)
        self._mark(low)
        core_t = low.core.transpose(1, 2).contiguous()
        return _linear(mat1, mat2.t(), bias, low.v, low.u, core_t)

    def _embedding(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        low = self.matrices.get(id(weight))
        if low is None:
            return NotImplemented
        self._mark(low)
        if self.groups > 1 and input.dim() and input.shape[0] == 1 and self.rows != 1:
            input = input.expand(self.rows, *input.shape[1:])
        self._check_rows(input, low)
        if torch.is_grad_enabled():
            u, v = _at_least_fp32(low.u[input]), _at_least_fp32(low.v)
            tail = u.reshape(self.groups, -1, u.shape[-1]) @ low.core @ v.t()
            wide = _at_least_fp32(F.embedding(input, weight))
            return (wide + tail.view(wide.shape)).to(weight.dtype)
        if input.dim() == 0:
            return lowrank_embedding(input.view(1), weight, low.u, low.v, low.core)[0]
        return lowrank_embedding(input, weight, low.u, low.v, low.core)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        return self._norm(input, normalized_shape, weight, bias, eps, centred=True)

    def _rms_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Any:
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        return self._norm(input, normalized_shape, weight, None, eps, centred=False)

    def _norm(
        self,
        x: Tensor,
        shape: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
    ) -> Any:
        tracked = self.dense.get(id(weight)) or self.dense.get(id(bias))
        if tracked is None:
            return NotImplemented
        self._check_rows(x, tracked)
        return normed(x, tuple(shape), self._values(weight), self._values(bias), eps, centred)

    def _elementwise(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        """A norm's own arithmetic, with the fp32 value in place of the parameter."""
        if getattr(func, "__name__", "") in ("__get__", "dim", "size", "numel"):
            return None

        def call(*args: Any, **kwargs: Any) -> Any:
            tracked = [a for a in args if isinstance(a, Tensor) and id(a) in self.dense]
            if not tracked:
                return NotImplemented
            others = [a for a in args if isinstance(a, Tensor) and id(a) not in self.dense]
            x = others[0] if others else None
            if x is not None and func in _PRODUCTS and len(args) == 2 and x.dim() > 1:
                value = self.dense[id(tracked[0])]
                self._check_rows(x, value)
                return scaled(x, self._mark(value).values, tracked[0].dtype)
            out = func(
                *(
                    self._value(a, x) if isinstance(a, Tensor) and id(a) in self.dense else a
                    for a in args
                ),
                **kwargs,
            )
            if isinstance(out, Tensor) and others and out.is_floating_point():
                dtype = tracked[0].dtype
                for other in others:
                    dtype = torch.promote_types(dtype, other.dtype)
                out = out.to(dtype)
            return out

        return call

    def _value(self, parameter: Tensor, x: Tensor | None) -> Tensor:
        """The parameter's values, shaped to broadcast over x or the norm's input (rows, ..., n)."""
        value = self.dense.get(id(parameter))
        if value is None:
            return parameter
        self._mark(value)
        if self.groups == 1:
            return value.values[0]
        shape = tuple(x.shape) if x is not None and x.dim() > 1 else self._shape
        if len(shape) < 2 or shape[0] % self.rows:
            raise GroupsDiffer(
                f"{value.entry.name} is used apart from the norm's input, which has the batch axis"
            )
        per_row = value.values.repeat_interleave(shape[0] // self.groups, 0)
        return per_row.view(shape[0], *[1] * (len(shape) - 2), -1)

    def _values(self, parameter: Tensor | None) -> Tensor | None:
        """A vector as it is, or its values (n) or (groups, n) where it is trained."""
        value = self.dense.get(id(parameter))
        if value is None:
            return parameter
        values = self._mark(value).values
        return values if self.groups > 1 else values[0]

    def _mark(self, tracked: Any) -> Any:
        tracked.used = True
        return tracked

    def _check_rows(self, x: Tensor, tracked: LowRank | DenseValue | None) -> None:
        if self.groups > 1 and (x.dim() < 1 or x.shape[0] % self.rows):
            name = tracked.entry.name if tracked else "a parameter"
            raise GroupsDiffer(
                f"{name} gets an input of shape {tuple(x.shape)} without the batch axis"
            )


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    if x.dtype != w.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(w.dtype)  # the weights' precision is the more exact one
    if torch.is_grad_enabled():  # between steps a user may differentiate through the model
        inner = _at_least_fp32(x @ v).view(core.shape[0], -1, v.shape[1])
        tail = inner @ core.transpose(1, 2)
        tail = (tail.to(x.dtype) @ u.t()).view(*x.shape[:-1], -1)
        return _add_bias(F.linear(x, w) + tail, bias)
    if x.dim() == 1:
        return lowrank_linear(x[None], w, bias, u, v, core)[0]
    return lowrank_linear(x, w, bias, u, v, core)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias, added in the wider precision and rounded once; nobody else holds y."""
    if bias is None:
        return y
    # bias (m), or (groups, m)
    grouped = y.view(bias.numel() // y.shape[-1], -1, y.shape[-1])
    bias = bias.view(-1, 1, y.shape[-1])
    if torch.is_grad_enabled():
        return (grouped + bias).to(y.dtype).view(y.shape)
    return grouped.add_(bias).view(y.shape)


def _grouped_linear(x: Tensor, w: Tensor, bias: Tensor | None, low: LowRank) -> Tensor:
    """x (W + U C V^T viewed as W's shape)^T + b where the factors group W's rows or columns.

    W' (m c / p, n p / c) is W (m, n) with p rows joined or each row cut into c pieces. Piece j of
    x meets rows j of V, and an output row reads the c pieces of U's rows that make it up.
    """
    pieces = row_or_column_groups(tuple(w.shape), (low.u.shape[0], low.v.shape[0]))
    assert pieces is not None
    joined, cut = pieces
    groups, r = low.core.shape[0], low.core.shape[1]
    m, n = w.shape
    rows = x.reshape(groups, -1, n)
    if cut > 1:
        h = rows.reshape(groups, -1, n // cut) @ low.v  # each piece of the row on its own
        h = (h.float() @ low.core.transpose(1, 2)).to(x.dtype).view(groups, -1, cut * r)
        tail = h @ low.u.view(m, cut * r).t()
    else:
        v = low.v.view(joined, n, r).permute(1, 0, 2).reshape(n, joined * r)
        h = (rows @ v).view(groups, -1, r)
        h = (h.float() @ low.core.transpose(1, 2)).to(x.dtype)
        tail = (h @ low.u.t()).view(groups, -1, joined, m // joined).transpose(2, 3)
        tail = tail.reshape(groups, -1, m)
    y = F.linear(x, w)
    return _add_bias(y + tail.reshape(y.shape), bias)
