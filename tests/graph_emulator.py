"""A CUDA graph on the CPU: what a captured step does with memory, without a GPU.

While "capturing", a dispatch mode records every op with its very tensors and undoes what it wrote
at the end; a replay runs the ops again on the same memory. So, as on a GPU, Python does not run
again, numbers that Python knew are baked in, and a read of a value is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from subzero_kernels import perturb_many_

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")


class Graph:
    """Ops in order, each with what it took and gave when it was captured."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, list[Any]]] = []
        self.before: dict[int, tuple[Any, Any]] = {}

    def replay(self) -> None:
        for op, args, kwargs, gave in self.ops:
            inputs = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for new, held in zip(tree_flatten(op(*args, **kwargs))[0], gave, strict=True):
                if isinstance(held, Tensor) and _memory(held) not in inputs:
                    held.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"called a synchronizing CUDA operation ({func})")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._note(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._note(argument, kwargs[argument.name])
        out = func(*args, **kwargs)
        self.graph.ops.append((func, args, kwargs, tree_flatten(out)[0]))
        return out

    def _note(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for t in tree_leaves(value):
            storage = t.untyped_storage()
            self.graph.before.setdefault(storage.data_ptr(), (storage, storage.clone()))


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """``opt.capture`` on a CPU makes such a graph."""
    import transformers.utils.import_utils as transformers_utils

    import subzero.capture as capture
    import subzero.objectives as objectives
    import subzero.rows as rows
    import subzero.weights as weights

    recording: list[Recording] = []

    @contextlib.contextmanager
    def graph(made: Graph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        recording.append(Recording(made))
        try:
            with recording[0]:
                yield
        finally:
            recording.clear()
            for storage, before in made.before.values():  # a capture runs nothing
                storage.copy_(before)

    cuda = SimpleNamespace(
        graph=graph,
        CUDAGraph=Graph,
        Stream=lambda device: _Stream(),
        current_stream=_Stream,
        stream=lambda stream: contextlib.nullcontext(),
        device=lambda device: contextlib.nullcontext(),
        graph_pool_handle=lambda: (0, 1),
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
    )
    monkeypatch.setattr(capture, "torch", _Torch(cuda))
    monkeypatch.setattr(capture, "has_graphs", lambda device: True)
    monkeypatch.setattr(weights, "perturb_plan", _Plan)
    for module in (rows, objectives):
        monkeypatch.setattr(module, "readable", lambda tensor: not recording)
    monkeypatch.setattr(transformers_utils, "is_cuda_stream_capturing", lambda: bool(recording))


class _Plan:
    """A plan calls its kernels without torch's dispatcher; the op does the same, and is seen."""

    def __init__(self, ws: Any, us: Any, vs: Any, streams: Any) -> None:
        self.lists, self.streams = (ws, us, vs), streams

    def perturb_(self, coeff: Tensor, rng: Tensor) -> None:
        perturb_many_(*self.lists, coeff, rng, streams=self.streams)


class _Torch:
    """torch with another torch.cuda, for one module."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
