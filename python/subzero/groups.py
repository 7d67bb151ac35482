"""All signs and queries of a step in one forward: batches repeated group by group.

Group g of G holds rows g * B to (g + 1) * B of every tensor of the batch. Blocks in front of the
first trained one give every group the same values, so SharedPrefix runs them on one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Hooks


def batch_size(batch: Any) -> int:
    """The number of examples: axis 0 of input_ids where there is one, else of the first tensor."""
    if isinstance(batch, Mapping):
        for key in ("input_ids", "inputs_embeds", "pixel_values", "input_values"):
            value = batch.get(key)
            if isinstance(value, Tensor) and value.dim():
                return value.shape[0]
    sizes = [t.shape[0] for t in tensors_of(batch) if t.dim()]
    if not sizes:
        raise TypeError(
            f"batch: expected tensors with the examples along axis 0, got {type(batch).__name__} "
            "without any; pass a tensor, or a dict or tuple of tensors"
        )
    return next((s for s in sizes if s > 1), 1)


def repeat_batch(batch: Any, groups: int) -> Any:
    """Every tensor whose axis 0 is the batch, repeated ``groups`` times, group-major.

    Tensors with leading axis 1 are expanded to all rows, any others are passed as they are.
    """
    examples = batch_size(batch)

    def repeat(t: Tensor) -> Tensor:
        if t.dim() and t.shape[0] == examples:
            return t.repeat(groups, *[1] * (t.dim() - 1))
        if t.dim() > 1 and t.shape[0] == 1:
            return t.expand(groups * examples, *t.shape[1:])
        return t

    return batch if groups == 1 else map_tensors(batch, repeat)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested mappings, lists and tuples, in their order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(tree, note)
    return found


def map_tensors(tree: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``fn`` on each tensor of nested mappings, lists and tuples; everything else as it is."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        new = {key: map_tensors(value, fn) for key, value in tree.items()}
        return new if type(tree) is dict else type(tree)(new)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, fn) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, fn) for value in tree)
    return tree


class SharedPrefix:
    """Runs the leading blocks without trained parameters once instead of once a group.

    Each such block gets its tensors cut to the first group, and the output of the last one is
    repeated. The first time an input of some shape arrives its groups are compared: if they
    differ (something trained came before), or it is no batch after all, nothing is shared.
    Tensors that fold other axes into the first one (ALiBi: batch times heads) are cut as well.
    While torch.compile traces there are no values to compare: then blocks are shared where nothing
    but later blocks of the list and the output head is trained.
    """

    def __init__(self, model: nn.Module, trained: set[int], hooks: Hooks) -> None:
        self.groups = 1
        self.rows = 1
        self._checked: dict[tuple[Any, ...], tuple[bool, set[tuple[int, ...]]]] = {}
        self._active = False
        self._folded: set[tuple[int, ...]] = set()  # shapes of tensors with more rows than a batch
        self._nothing_before: set[nn.Module] = set()  # first blocks
        self.names: list[str] = []
        for name, blocks in outer_lists(model):
            count = 0
            while count < len(blocks) and not any(
                id(p) in trained for p in blocks[count].parameters()
            ):
                count += 1
            if not count:
                continue
            later = {id(p) for block in blocks[count:] for p in block.parameters()}
            if trained <= later | _ids_of_untied_head(model):
                self._nothing_before.add(blocks[0])
            self.names.append(f"{name}.0" if count == 1 else f"{name}.0-{count - 1}")
            for i in range(count):
                pre = self._first if i == 0 else self._cut_call
                hooks.add(blocks[i].register_forward_pre_hook, pre, with_kwargs=True)
            hooks.add(blocks[count - 1].register_forward_hook, self._last)

    def _first(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        self._active = self.groups > 1 and self._same_groups(block, args, kwargs)
        return self._cut_call(block, args, kwargs)

    def _cut_call(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._active:
            return None
        return map_tensors(args, self._cut), map_tensors(kwargs, self._cut)

    def _last(self, block: nn.Module, args: Any, output: Any) -> Any:
        if not self._active:
            return None
        self._active = False
        examples = self.rows // self.groups

        def repeat(t: Tensor) -> Tensor:
            if t.dim() > 1 and t.shape[0] == examples:
                return t.repeat(self.groups, *[1] * (t.dim() - 1))
            return t

        return map_tensors(output, repeat)

    def _cut(self, t: Tensor) -> Tensor:
        if self._is_batch(t) or tuple(t.shape) in self._folded:
            return t[: t.shape[0] // self.groups]
        return t

    def _is_batch(self, t: Tensor) -> bool:
        return t.dim() > 1 and t.shape[0] == self.rows

    def _may_fold(self, t: Tensor) -> bool:
        return t.dim() > 2 and t.shape[0] > self.rows and t.shape[0] % self.rows == 0

    def _same_groups(self, block: nn.Module, args: Any, kwargs: Any) -> bool:
        found = tensors_of((args, kwargs))
        tensors = [t for t in found if self._is_batch(t)]
        others = [t for t in found if self._may_fold(t)]
        if torch.compiler.is_compiling():
            self._folded = set()
            return bool(tensors) and not others and block in self._nothing_before
        shapes = (tuple(t.shape) for t in [*tensors, *others])
        key = (id(block), self.groups, self.rows, *shapes)
        if key not in self._checked:
            folded = {tuple(t.shape) for t in others if self._repeats(t)}
            self._checked[key] = bool(tensors) and all(map(self._repeats, tensors)), folded
        same, self._folded = self._checked[key]
        return same

    def _repeats(self, t: Tensor) -> bool:
        parts = t.chunk(self.groups)
        return all(torch.equal(part, parts[0]) for part in parts[1:])


def _ids_of_untied_head(model: nn.Module) -> set[int]:
    """Of the output head's parameters, unless it shares them with the embeddings."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return set()
    shared = model.get_input_embeddings().parameters()  # type: ignore[operator]
    return set(map(id, head.parameters())) - set(map(id, shared))


def outer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The module lists of blocks, without those inside a block."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{n}.") for n, _ in found
        ):
            found.append((name, module))
    return found
