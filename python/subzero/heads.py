"""The output head of a model, run on the rows that a loss reads and on no others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hooks import owners
from .rows import take

# Logits formed at a time for a language-model loss: 64 MiB in 16 bits, as much again in fp32.
_LOGITS = 1 << 25

# Whether a model returns what its head gives, as it is: a scale or a soft cap may follow.
_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def at_least_fp32(x: Tensor) -> Tensor:
    """Losses are formed in fp32, or in float64 for float64 models."""
    return x if x.dtype == torch.float64 else x.float()


def logits_at(
    model: nn.Module, batch: Any, index: Tensor, tokens: Tensor | None = None, **extra: Any
) -> Tensor:
    """The model's logits at index (examples, P), of ``tokens`` only if asked.

    The model's own head runs on the rows that are read, so whatever follows it (a scale, a soft
    cap) stays as it is. Logits of chosen tokens are products in fp32.

    Args:
        tokens: ids of the vocabulary, int64 (words,), on the device.
        extra: further arguments of the model's forward.

    Returns:
        (examples, P, vocabulary or len(tokens)).
    """
    head = _head(model)
    if head is None:
        output = _run(model, batch, extra)
        logits = take(output if isinstance(output, Tensor) else output.logits, index)
        return logits if tokens is None else logits.index_select(-1, tokens)
    whole: Any = head.forward
    weight: Any = head.weight
    cut = tokens is not None and type(head) is nn.Linear and _selects_rows(head)

    def forward(hidden: Tensor) -> Tensor:
        hidden = take(hidden, index)
        if not cut:
            return whole(hidden)
        assert tokens is not None
        return _some_outputs(hidden, weight, head.bias, tokens.to(weight.device))

    with _in_place_of(head, forward):
        logits = _run(model, batch, extra).logits
    return logits if tokens is None or cut else logits.index_select(-1, tokens)


def hidden_at(model: nn.Module, batch: Any, index: Tensor) -> Tensor | None:
    """What the head takes at index (examples, P): (examples, P, width); the head does not run.

    None where there is no head, or where the model works on what its head gives: then the loss
    needs the model's logits.
    """
    head = _head(model)
    weight = getattr(head, "weight", None)
    if weight is None or not _plain_heads.get(model, True):
        return None
    found: list[tuple[Tensor, Tensor]] = []

    def forward(hidden: Tensor) -> Tensor:
        none = hidden.new_empty(len(hidden), 0, len(weight))  # logits of no position
        found.append((take(hidden, index), none))
        return none

    with _in_place_of(head, forward):
        output = _run(model, batch, {})
    plain = len(found) == 1 and output.logits is found[0][1]
    _plain_heads[model] = plain
    return found[0][0] if plain else None


def next_token_losses(
    rows: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """-log softmax(logits)[target], (examples, P) in fp32 or wider, a few positions at a time.

    Args:
        rows: what ``head`` takes, (examples, P, width), or without a head the logits themselves.
        targets: int64 (examples, P).
    """
    targets = targets.to(rows.device)
    weight = getattr(head, "weight", None)
    vocabulary = rows.shape[-1] if weight is None else weight.shape[0]
    width = max(1, _LOGITS // max(1, len(rows) * vocabulary))
    losses = []
    for some, target in zip(rows.split(width, 1), targets.split(width, 1), strict=True):
        logits = at_least_fp32(some if head is None else head(some))
        losses.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none"))
    return torch.cat(losses, 1)


def forward_names(model: nn.Module) -> set[str]:
    """Argument names of the model's forward, looking through PEFT's wrapper."""
    base = getattr(model, "get_base_model", lambda: model)()
    return set(inspect.signature(base.forward).parameters)


def _head(model: nn.Module) -> Any:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _run(model: nn.Module, batch: Any, extra: dict[str, Any]) -> Any:
    """The model on what its forward knows by name, labels aside."""
    taken = forward_names(model)
    inputs = {name: value for name, value in batch.items() if name in taken and name != "labels"}
    if "use_cache" in taken:
        extra.setdefault("use_cache", False)
    return model(**inputs, **extra)


def _selects_rows(head: Any) -> bool:
    paths = [owner for owner in owners(head) if hasattr(owner, "selects_rows")]
    return all(path.selects_rows(head.weight) for path in paths)


def _some_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """x W[rows]^T + b[rows] in fp32 or wider, (..., k) for x (..., n).

    Of a trained weight or bias the side path gives the rows of each group, (groups, k, n) and
    (groups, k).
    """
    some = at_least_fp32(torch.index_select(weight, 0, rows))
    groups = len(some) if some.dim() == 3 else 1
    y = at_least_fp32(x).reshape(groups, -1, x.shape[-1]) @ some.mT
    if bias is not None:
        shift = at_least_fp32(torch.index_select(bias, 0, rows))
        y = y.reshape(shift.numel() // len(rows), -1, len(rows)) + shift.view(-1, 1, len(rows))
    return y.view(*x.shape[:-1], len(rows))


@contextmanager
def _in_place_of(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]
