"""What a step changes about the model and puts back: hooks, inert in a copy, and its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """Calls ``call``. A copied or pickled model gets an inert hook and folded weights."""

    def __init__(
        self, call: Callable[..., Any] | None, before_copy: Callable[[dict[int, Any]], None]
    ):
        self._call = call
        self._before_copy = before_copy

    @property
    def owner(self) -> Any:
        """The object whose method is called."""
        return getattr(self._call, "__self__", None)

    @property
    def live(self) -> bool:
        """Whether an optimizer stands behind it."""
        return self._call is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._call is None else self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        if self._call is not None:
            self._before_copy(memo)
        return Hook(None, _nothing)

    def __reduce__(self) -> Any:
        if self._call is not None:
            self._before_copy({})
        return Hook, (None, _nothing)


class Hooks:
    """The handles of one owner's hooks."""

    def __init__(self, before_copy: Callable[[dict[int, Any]], None]) -> None:
        self._before_copy = before_copy
        self._handles: list[RemovableHandle] = []

    def add(
        self, register: Callable[..., RemovableHandle], call: Callable[..., Any], **options: Any
    ) -> None:
        """``register`` is a bound method such as ``module.register_forward_hook``."""
        self._handles.append(register(Hook(call, self._before_copy), **options))

    @property
    def attached(self) -> bool:
        """Whether there are any, which ``remove`` ends."""
        return bool(self._handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def owners(module: nn.Module) -> list[Any]:
    """Whose live hooks run after the module's forward."""
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, Hook)]
    return [hook.owner for hook in hooks if hook.live]


def _nothing(memo: dict[int, Any]) -> None:
    """An inert hook's copies need no preparation."""


def attached(model: nn.Module) -> bool:
    """Whether an optimizer's hooks are on any module of ``model``."""
    return any(
        isinstance(hook, Hook) and hook.live
        for module in model.modules()
        for hook in module._state_dict_pre_hooks.values()
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, as in the papers: eval mode, unseen by hooks; the modes are put back."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
