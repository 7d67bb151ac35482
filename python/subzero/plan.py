"""Which parameter goes which way, and why. Nothing that requires grad is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from subzero_kernels import factor_shape

SIDE = "side path"  # evaluated as W + U C V^T, W read-only
IN_PLACE = "in place"  # W itself is perturbed by the fused op and perturbed back
COPY = "copy"  # perturbed in place, restored from a pristine copy
DENSE = "fp32 value"  # perturbed value used in fp32 inside the norm or the bias add
DENSE_COPY = "rounded value"  # perturbed value rounded into the parameter, restored from its master

FACTORED_WAYS = (SIDE, IN_PLACE, COPY)
RESHAPES = ("auto", "none", "square", "grouped")


@dataclass(frozen=True)
class Entry:
    """One parameter that requires grad.

    ``index`` is the parameter index of the RNG contract: the position in
    ``model.named_parameters()``, frozen parameters counted, tied weights once.
    ``factor`` is (m', n') and ``rank`` is r; a dense parameter has neither, and rank 0.
    """

    name: str
    index: int
    param: nn.Parameter
    way: str
    why: str
    factor: tuple[int, int] = (0, 0)
    rank: int = 0

    @property
    def mu(self) -> float:
        """sqrt(m' n') / r, the scale of the perturbation U Z V^T."""
        return math.sqrt(self.factor[0] * self.factor[1]) / self.rank

    @property
    def copy_bytes(self) -> int:
        """Bytes held beside the parameter: its pristine copy or its fp32 master."""
        if self.way == COPY:
            return self.param.numel() * self.param.element_size()
        return 0 if self.rank else self.param.numel() * 4


@dataclass
class Plan:
    """The list of trained parameters and how they are evaluated; ``print(plan)`` shows it.

    ``one_by_one`` says why the groups (signs and queries) of a step run one after another,
    empty when they share one forward. ``shared`` counts leading blocks that run once for all.
    """

    entries: list[Entry]
    frozen: int
    requested_rank: int
    one_by_one: str = ""
    shared: list[str] = field(default_factory=list)

    @property
    def factored(self) -> list[Entry]:
        return [e for e in self.entries if e.rank]

    @property
    def dense(self) -> list[Entry]:
        return [e for e in self.entries if not e.rank]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "factors", "rank", "way", "why")]
        for e in self.entries:
            factor = " x ".join(map(str, e.factor)) if e.rank else "-"
            rank = str(e.rank or "-")
            rows.append((e.name, " x ".join(map(str, e.param.shape)), factor, rank, e.way, e.why))
        widths = [max(len(row[c]) for row in rows) for c in range(5)]
        lines = [
            "  ".join([*(t.ljust(w) for t, w in zip(r, widths, strict=False)), r[5]]) for r in rows
        ]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """A few lines: how much is trained, in which subspace, at which cost in memory."""
        trained = sum(e.param.numel() for e in self.entries)
        cores = sum(e.rank**2 for e in self.factored)
        dense = sum(e.param.numel() for e in self.dense)
        clipped = sum(e.rank < self.requested_rank for e in self.factored)
        bases = sum(sum(e.factor) * e.rank * e.param.element_size() for e in self.factored)
        lines = [
            f"{trained:,} parameters trained ({len(self.factored)} matrices, "
            f"{len(self.dense)} dense), {self.frozen:,} frozen",
            f"{cores + dense:,} directions: {cores:,} in cores of rank up to {self.requested_rank}"
            + (f" (rank clipped for {clipped} smaller matrices)" if clipped else "")
            + f", {dense:,} dense",
            f"memory: bases {bases:,} bytes, cores {4 * cores:,} bytes, "
            f"copies {sum(e.copy_bytes for e in self.entries):,} bytes",
            f"groups of a step: one after another ({self.one_by_one})"
            if self.one_by_one
            else "groups of a step: all signs and queries in one forward",
        ]
        if self.shared and not self.one_by_one:
            lines.append(
                f"run once for all groups: {', '.join(self.shared)} (nothing trained there)"
            )
        return "\n".join(lines)


def make_plan(model: nn.Module, rank: int, apply: str, reshape: str) -> Plan:
    """Classify every parameter of ``model`` that requires grad."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    entries = []
    frozen = 0
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad:
            frozen += parameter.numel()
        elif parameter.numel():
            entries.append(
                _classify(name, index, parameter, owners[id(parameter)], rank, apply, reshape)
            )
    return Plan(entries, frozen, rank, _why_one_by_one(model, entries, apply))


def _classify(
    name: str,
    index: int,
    p: nn.Parameter,
    owners: list[tuple[nn.Module, str]],
    rank: int,
    apply: str,
    reshape: str,
) -> Entry:
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(
            f"{name}: expected a parameter in fp32, bf16 or fp16, got {p.dtype}; "
            "freeze it with requires_grad_(False)"
        )
    if sum(size > 1 for size in p.shape) <= 1:
        return _dense(name, index, p, owners, "at most one dimension above 1")
    if not p.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous parameter, got strides {p.stride()} for shape "
            f"{tuple(p.shape)}; store it with .data = .data.contiguous() before building SubZero"
        )
    natural = factor_shape(p.shape, "none")
    rule = reshape
    if reshape == "auto":  # adapter tensors are thin: near-square factors, as the paper does
        adapter = any(part in name for part in ("lora_", "prompt_", "prefix_"))
        rule = ("square" if apply == "in_place" else "grouped") if adapter else "none"
    factor = factor_shape(p.shape, rule)
    if min(factor) == 1:
        return _dense(name, index, p, owners, f"{p.numel()} elements have no factor pair but 1 x n")
    r = min(rank, *factor)
    if apply == "in_place":
        return Entry(name, index, p, IN_PLACE, "fused in-place op", factor, r)
    kinds = {matrix_kind(module, attribute) for module, attribute in owners}
    if None in kinds:
        owner = next(type(m).__name__ for m, a in owners if matrix_kind(m, a) is None)
        return Entry(name, index, p, COPY, f"{owner} has no side path", factor, r)
    kind = " and ".join(sorted(k for k in kinds if k))
    if factor == natural:
        return Entry(name, index, p, SIDE, kind, factor, r)
    if kinds == {"Linear"} and row_or_column_groups(tuple(p.shape), factor):
        return Entry(name, index, p, SIDE, f"{kind}, reshaped by grouping", factor, r)
    return Entry(name, index, p, COPY, f"{kind}, reshaped factors cut across rows", factor, r)


def _dense(
    name: str, index: int, p: nn.Parameter, owners: list[tuple[nn.Module, str]], why: str
) -> Entry:
    # one owner that serves it is enough, others are aliases: BERT's head holds its decoder's bias
    known = p.dim() == 1 and any(
        is_norm(module)
        or (attribute == "bias" and matrix_kind(module, "weight") in ("Linear", "Conv1D"))
        for module, attribute in owners
    )
    owner = type(owners[0][0]).__name__
    if known:
        return Entry(name, index, p, DENSE, f"{why}; used in fp32 by {owner}")
    return Entry(name, index, p, DENSE_COPY, f"{why}; {owner} reads it from memory")


def matrix_kind(module: nn.Module, attribute: str) -> str | None:
    """The side path that serves this module's weight, or None."""
    if attribute != "weight":
        return None
    # nn.MultiheadAttention hands this module's weight to a fused function: its forward never runs
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Embedding):
        return "Embedding" if module.max_norm is None else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "Conv1D"
    return None


def is_norm(module: nn.Module) -> bool:
    """LayerNorm and RMSNorm of torch or of a model: elementwise in the last axis of the input."""
    name = type(module).__name__
    own = [p for p in module._parameters.values() if p is not None]
    return (
        ("LayerNorm" in name or "RMSNorm" in name)
        and not any(True for _ in module.children())
        and bool(own)
        and all(p.dim() == 1 for p in own)
    )


def row_or_column_groups(shape: tuple[int, ...], factor: tuple[int, int]) -> tuple[int, int] | None:
    """(row pieces, column pieces) when (m', n') groups whole rows or cuts rows evenly, else None.

    (1, g): each row of W (m, n) is cut into g pieces, W' is (m g, n / g).
    (g, 1): g neighbouring rows are joined, W' is (m / g, g n).
    """
    m, n = shape
    if factor[0] >= m and factor[0] % m == 0:
        return 1, factor[0] // m
    if factor[1] >= n and factor[1] % n == 0:
        return factor[1] // n, 1
    return None


def _why_one_by_one(model: nn.Module, entries: Iterable[Entry], apply: str) -> str:
    if apply == "in_place":
        return 'apply="in_place" changes the weights between groups'
    for e in entries:
        if e.way in (COPY, DENSE_COPY):
            return f"{e.name} is perturbed in memory"
        if "relative_attention_bias" in e.name:
            return f"{e.name} has no batch axis in its input"
    trained: set[int] = {id(e.param) for e in entries}
    for name, module in model.named_modules():
        kind = type(module).__name__
        routed = kind.endswith(("Experts", "MoE")) or "SparseMoe" in kind or "MoeBlock" in kind
        if routed and any(id(p) in trained for p in module.parameters()):
            return f"{name} regroups its rows by expert"
    return ""


def one_device(params: Iterable[Tensor]) -> torch.device:
    """The device all trained parameters live on."""
    devices = {p.device for p in params}
    if len(devices) != 1:
        raise ValueError(
            "model: expected all trained parameters on one device, got "
            f"{sorted(map(str, devices))}; load it without device_map or freeze the parts elsewhere"
        )
    return devices.pop()
