"""One step as one CUDA graph.

A graph replays kernels on fixed addresses, so everything that outlives a step has memory of its
own outside the graph: cores and masters, bases, the rule's state, counters, the numbers of the
param group, the batch's buffers and the loss. What is left inside is used up within one replay.
Hence graphs of several shapes can share one pool of memory and be replayed in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .activation_weights import ActivationWeights
from .groups import map_tensors, tensors_of
from .losses import micro_masks
from .masks import packed_as_before
from .micros import Extent
from .objectives import LogitsLoss

if TYPE_CHECKING:
    from .optimizer import SubZero

# Losses are handed out from a block of this many, so that a call allocates nothing and what it
# returned stays as it is when the graph runs again.
_LOSSES = 4096


def has_graphs(device: torch.device) -> bool:
    """Whether steps on this device can be captured; elsewhere they are made as they are."""
    return device.type == "cuda"


class GraphMemory:
    """The pool that all graphs of one optimizer share, and the stream they are captured on."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


class CapturedStep:
    """``loss = run(batch)``: a training step on batches of one shape. Made by ``SubZero.capture``.

    The graph holds noise, all forwards, losses, the rule, the update and the counters; a call
    copies a batch into its buffers and replays it, bit for bit what ``step(batch, objective)``
    does, without waiting for the device and without allocating. lr, eps, momentum and the like
    may change between calls, windows open and fold as they do in ``step``, both ways of making
    a step may alternate, and ``state_dict`` and ``load_state_dict`` go on working. Capturing
    makes no step.

    With activation noise the first call is made as ``step`` is, unless ``bases_from`` came before:
    its rows give the bases. It waits for the device, and so does a call that opens a window, whose
    bases come from the rows seen. Form full makes its graph anew where weight decay begins or ends.

    A graph is of one shape: capture one for each bucket of lengths. All share one pool of
    memory, that of the largest. On a CPU, which has no graphs, ``run(batch)`` is the step.

    Args:
        batch, objective, positions: as in ``step``. The batch gives shapes, dtypes and whatever
            is no tensor; its values do not matter, but for the number of positions that a
            LogitsLoss reads: a later batch may have fewer. If one has more, a batch from the
            CPU is an error, and one from the device a step that is skipped.

    Raises:
        RuntimeError: the model or the objective reads a value from the device, or does
            something else that a CUDA graph cannot hold.
        ValueError, TypeError: as in ``step``.

    Attributes:
        graph: the CUDA graph, or None on a device that has none.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, opt: SubZero, batch: Any, objective: Any, positions: Any) -> None:
        self._opt = opt
        self._objective = objective
        self._sizes: list[Any] | None = None
        device = opt._weights.device
        if not callable(objective):
            raise TypeError(f"objective: expected a callable, got {type(objective).__name__}")
        opt._read_group()
        opt._bind(batch, objective, positions)

        def buffer(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device=device).copy_(t)

        self._batch = map_tensors(batch, buffer)
        self._positions = map_tensors(positions, buffer)
        if has_graphs(device):
            if opt.options.activation:
                opt._queries.prepare(self._batch, objective, self._positions)
            self._sizes = self._read_sizes(self._batch, self._positions)
            self._capture()

    @torch.no_grad()
    def __call__(self, batch: Any, positions: Any = None) -> Tensor:
        """One step. Batches from the CPU are best pinned; do not overwrite them before it is done.

        Returns:
            0-d fp32 tensor on the device, as ``SubZero.step`` does.

        Raises:
            ValueError: a batch of another shape, dtype or structure than the captured one.
            RuntimeError: the optimizer was detached.
        """
        opt = self._opt
        if not opt._weights.hooks.attached:
            raise RuntimeError(
                "run: expected an attached optimizer, got one after detach(); build SubZero again "
                "and capture its step"
            )
        opt._read_group()
        pairs = [*_pairs("batch", self._batch, batch)]
        pairs += _pairs("positions", self._positions, positions)
        self._check_sizes(batch, positions)
        for held, given in pairs:
            held.copy_(given, non_blocking=True)
        opt._open_window()
        if self.graph is None or not opt._weights.ready:  # the first rows give V: read once
            loss = self._step()
        else:
            loss = self._replay()
        opt.steps += 1
        opt._record_step()
        opt._opt_called = True  # type: ignore[attr-defined]  # what LR schedulers look at
        return loss

    # making the graph

    def _capture(self) -> None:
        with torch.cuda.device(self._opt._weights.device):
            self._make_graph()
        self._holds = self._held()

    def _held(self) -> tuple[Any, ...]:
        """What the graph holds as it is: where it changes, the graph is made again."""
        opt = self._opt
        if not isinstance(opt._weights, ActivationWeights):
            return (opt._recorder,)
        return opt._queries.decodes, opt._weights.full is not None and opt._numbers.decays

    def _make_graph(self) -> None:
        opt = self._opt
        if opt._graph_memory is None:
            opt._graph_memory = GraphMemory(opt._weights.device)
        memory = opt._graph_memory
        self._loss = torch.zeros((), device=opt._weights.device)
        self._losses, self._given = self._loss.new_empty(_LOSSES), 0
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        with (
            _leaving_no_trace(opt),
            opt._weights.as_ready(),
            packed_as_before(self._batch) as packed,
        ):
            memory.stream.wait_stream(current)
            with torch.cuda.stream(memory.stream):
                opt._rehearsing = True
                self._step_body()  # compiles kernels, makes the rule's state, compares the groups
                opt._rehearsing = False
            current.wait_stream(memory.stream)
            opt._capturing = True
            packed.repeat()
            before = torch.cuda.get_sync_debug_mode()
            try:
                # other threads, of data loaders, may use the device meanwhile
                with torch.cuda.graph(
                    graph, memory.pool, memory.stream, capture_error_mode="thread_local"
                ):
                    torch.cuda.set_sync_debug_mode("error")
                    try:
                        self._loss.copy_(self._step())
                    finally:
                        torch.cuda.set_sync_debug_mode(before)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"capture: expected a step that a CUDA graph can hold, got {_first(error)}; "
                    "keep the model and the objective from reading values of device tensors "
                    "(.item(), bool(), nonzero, masks as indices), or take step(batch, objective)"
                ) from error
        self.graph = graph

    def _step_body(self) -> tuple[Tensor, Tensor]:
        return self._opt._bind(self._batch, self._objective, self._positions, self._sizes)()

    def _step(self) -> Tensor:
        loss, finite = self._step_body()
        self._opt._count(finite)
        return loss.float()

    def _replay(self) -> Tensor:
        if self._holds != self._held():
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        self._opt._weights.stepped(self._opt._numbers.decays)
        if self._given == _LOSSES:
            self._losses, self._given = torch.empty_like(self._losses), 0
        loss = self._losses[self._given]
        self._given += 1
        return loss.copy_(self._loss)

    # what a LogitsLoss reads

    def _read_sizes(self, batch: Any, positions: Any) -> list[Any] | None:
        """What is read of each micro-batch at most; None: the loss says, or reads all."""
        opt, objective = self._opt, self._objective
        if not isinstance(objective, LogitsLoss):
            return None
        if opt.options.activation:
            return [micro.extent for micro in opt._queries.bind(batch, objective, positions)]
        if objective.width is not None and positions is None:
            return None
        return [int(mask.sum(1).max()) for mask in self._masks(batch, positions)]

    def _check_sizes(self, batch: Any, positions: Any) -> None:
        """One error for a batch on the CPU that has more positions than the graph reads."""
        if self._sizes is None or any(
            t.device.type != "cpu" for t in tensors_of((batch, positions))
        ):
            return
        sizes = self._read_sizes(batch, positions)
        assert sizes is not None
        for most, size in zip(self._sizes, sizes, strict=True):
            what, wanted, got = "scored positions in an example", most, size
            if isinstance(most, Extent):
                wanted, got = most.width, size.width
                if got <= wanted:
                    what = "tokens from the first scored one of an example to its last"
                    wanted, got = most.length, size.length
                if most.unpacked and not size.unpacked:
                    what, wanted, got = "sequence in a row", 1, "several"
            if isinstance(got, str) or got > wanted:
                raise ValueError(
                    f"batch: expected at most {wanted} {what}, as the captured batch has, got "
                    f"{got}; capture a batch with as many as there can be"
                )

    def _masks(self, batch: Any, positions: Any) -> Iterator[Tensor]:
        batches = batch if isinstance(batch, list) else [batch]
        for some, mask in zip(batches, micro_masks(positions, len(batches)), strict=True):
            yield self._objective.scored(self._objective.prepare(self._opt.model, some), mask)


@contextmanager
def _leaving_no_trace(opt: SubZero) -> Iterator[None]:
    """Around a rehearsal, whose losses are not finite, and a capture, which runs nothing.

    Such steps are skipped, so only what a skipped step changes is put back. With apply="in_place"
    weights are written even then, and stay as they are if eps is 0.
    """
    weights = opt._weights
    changed, decayed, folds = weights.changed, weights.decayed, weights.fold_rng.clone()
    if opt.options.apply == "in_place":
        opt._numbers.store("eps", 0.0)
    try:
        yield
    finally:
        opt._rehearsing = opt._capturing = False
        opt._numbers.follow(opt.param_groups[0])
        weights.changed, weights.decayed = changed, decayed
        weights.fold_rng.copy_(folds)


def _pairs(name: str, held: Any, given: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(buffer, tensor) of two trees of one structure, or one error that names where they differ."""
    remedy = "capture a batch like this one too: all captured steps share their memory"
    if isinstance(held, Tensor):
        wanted, got = _shown(held), _shown(given)
        if got != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {got}; {remedy}")
        yield held, given
    elif isinstance(held, Mapping):
        if not isinstance(given, Mapping) or set(given) != set(held):
            raise ValueError(f"{name}: expected {_shown(held)}, got {_shown(given)}; {remedy}")
        for key in held:
            yield from _pairs(f"{name}[{key!r}]", held[key], given[key])
    elif isinstance(held, (list, tuple)):
        if not isinstance(given, (list, tuple)) or len(given) != len(held):
            raise ValueError(f"{name}: expected {_shown(held)}, got {_shown(given)}; {remedy}")
        for i, (mine, other) in enumerate(zip(held, given, strict=True)):
            yield from _pairs(f"{name}[{i}]", mine, other)
    elif isinstance(given, Tensor) or held != given:
        raise ValueError(f"{name}: expected {_shown(held)}, got {_shown(given)}; {remedy}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {str(value.dtype).partition('.')[2]}"
    if isinstance(value, Mapping):
        return f"the keys {sorted(map(str, value))}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)


def _first(error: BaseException) -> str:
    """What went wrong first: an error inside of a capture brings others with it."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
