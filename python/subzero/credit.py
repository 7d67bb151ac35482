"""Which linear's output carries activation noise, which weights that noise credits, and why.

Every weight of a Linear or Conv1D inside a block (an entry of an outer nn.ModuleList) that requires
grad is credited. credit="own": by noise on its own output. credit="block": the linears that write
to the residual stream share the noise on the last one's output, the others have their own.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .groups import outer_lists
from .plan import is_norm, matrix_kind

FORMS = ("core", "right", "full")
CREDITS = ("own", "block")

# Leaf names of linears whose output is added to the residual stream, by family: Llama, Qwen,
# Mistral, Gemma, Phi-3 (o_proj, down_proj); OPT, GPT-J (out_proj, fc2, fc_out); GPT-2 (c_proj);
# Phi, NeoX, Bloom, Falcon (dense, dense_4h_to_h, fc2); Cohere, StarCoder2 and others reuse these.
RESIDUAL_WRITERS = frozenset(
    {"o_proj", "down_proj", "out_proj", "fc2", "fc_out", "c_proj", "dense", "dense_4h_to_h"}
)
_OUTPUT_NORM = re.compile(r"post_(feedforward|mlp|ffn|ff|self_attn|attn)_?(layer)?_?norm")
_CROSS_ATTENTION = re.compile(r"(EncDecAttention|encoder_attn|cross_?attn|crossattention)", re.I)


@dataclass(frozen=True)
class Credit:
    """One credited weight, of shape (m, n) as a linear map; ``index`` as in the RNG contract.

    Attributes:
        source: index of the parameter whose linear's output carries the noise: its own, another's.
        transposed: stored as (n, m), as GPT-2's Conv1D does.
        axis: "main" for the tokens that logits belong to, "encoder" for the source's tokens.
        way: how it is trained; part of a saved state's identity.
        rank: of its state; 0 in form full.
    """

    name: str
    index: int
    param: nn.Parameter
    m: int
    n: int
    source: int
    transposed: bool
    axis: str
    form: str
    why: str
    rank: int = 0

    @property
    def noisy(self) -> bool:
        return self.source == self.index

    @property
    def way(self) -> str:
        return f"activation {self.form} from {self.source}"

    @property
    def shape(self) -> tuple[int, int]:
        """Of its state and of its gradient's estimate."""
        if self.form == "core":
            return self.rank, self.rank
        return self.m, self.rank if self.form == "right" else self.n


@dataclass
class CreditPlan:
    """What ``plan()`` shows with noise="activation".

    ``whole_groups`` says why queries are evaluated as whole groups, empty where a query costs a
    row. ``left`` holds (name, shape, why) of what requires grad and stays as it is.
    """

    entries: list[Credit]
    left: list[tuple[str, tuple[int, ...], str]]
    frozen: int
    form: str
    credit: str
    requested_rank: int
    why_own: str = ""
    whole_groups: str = ""
    shared: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = {e.index: e.name for e in self.entries}
        rows = [("parameter", "shape", "state", "noise", "credited by", "why")]
        for e in self.entries:
            state = " x ".join(map(str, e.shape)) if e.form != "full" else "-"
            noise = "own output" if e.noisy else "-"
            by = "its own noise" if e.noisy else f"noise on {names[e.source]}"
            rows.append((e.name, " x ".join(map(str, e.param.shape)), state, noise, by, e.why))
        for name, shape, why in self.left:
            rows.append((name, " x ".join(map(str, shape)), "-", "-", "nothing", why))
        widths = [max(len(row[c]) for row in rows) for c in range(5)]
        lines = [
            "  ".join([*(t.ljust(w) for t, w in zip(r, widths, strict=False)), r[5]]) for r in rows
        ]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """A few lines: how much is credited, in which form, and what a query costs."""
        trained = sum(e.param.numel() for e in self.entries)
        state = sum(e.shape[0] * e.shape[1] for e in self.entries if e.form != "full")
        noisy = sum(e.noisy for e in self.entries)
        lines = [
            f"{trained:,} parameters credited in {len(self.entries)} linears by noise on "
            f"{noisy} outputs, {self.frozen:,} frozen",
            f"form {self.form}"
            + (f", rank {self.requested_rank}: {state:,} numbers" if state else "")
            + f"; credit {self.credit}"
            + (f" ({self.why_own})" if self.why_own else ""),
            f"queries: whole groups ({self.whole_groups})"
            if self.whole_groups
            else "queries: a row each, decoded on the clean forward's keys and values",
        ]
        if self.left:
            lines.append(f"{len(self.left)} parameters require grad and stay as they are")
        if self.shared and self.whole_groups:
            lines.append(f"run once for all groups: {', '.join(self.shared)} (no noise there)")
        return "\n".join(lines)


def make_credit_plan(model: nn.Module, form: str, credit: str, where: str, rank: int) -> CreditPlan:
    """Classify every parameter that requires grad.

    Raises:
        ValueError: no linear to credit, or a rank above min(m, n) in forms core and right.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, module, attribute))
    blocks = [
        (f"{name}.{i}", block)
        for name, blocks in outer_lists(model)
        for i, block in enumerate(blocks)
    ]
    why_own = _why_own(model, [block for _, block in blocks]) if credit == "block" else ""
    entries, left, frozen = [], [], 0
    writers: dict[str, list[Credit]] = {}
    for index, (name, p) in enumerate(model.named_parameters()):
        if not p.requires_grad:
            frozen += p.numel()
            continue
        block = next((b for b, _ in blocks if name.startswith(f"{b}.")), None)
        why = _why_not(p, owners[id(p)], block)
        if not why and where == "loss" and _axis(model, owners[id(p)][0][0]) == "encoder":
            why = "where='loss' reads no row of the encoder"
        if why:
            left.append((name, tuple(p.shape), why))
            continue
        path, module, _ = owners[id(p)][0]
        transposed = not isinstance(module, nn.Linear)
        m, n = reversed(p.shape) if transposed else p.shape
        if form != "full" and rank > min(m, n):
            raise ValueError(
                f"rank: expected at most {min(m, n)} = min(m, n) of {name}, got {rank}; lower "
                "rank, freeze it, or take form='full'"
            )
        entry = Credit(
            name, index, p, m, n, index, transposed, _axis(model, path), form,
            f"noise on its own output ({why_own or 'own credit'})", 0 if form == "full" else rank,
        )  # fmt: skip
        entries.append(entry)
        if credit == "block" and not why_own:
            assert block is not None
            if _leaf(path) in RESIDUAL_WRITERS and "lora_" not in path:
                writers.setdefault(block, []).append(entry)
            else:
                reason = "adapter" if "lora_" in path else "does not write to the residual stream"
                entries[-1] = replace(entry, why=f"noise on its own output ({reason})")
    for group in writers.values():
        _share(entries, group)
    if not entries:
        raise ValueError(
            "model: expected a weight of a Linear or Conv1D inside its blocks (an nn.ModuleList) "
            f"that requires grad, got none ({len(left)} others do); unfreeze one, or take "
            "noise='weight'"
        )
    return CreditPlan(entries, left, frozen, form, credit, rank, why_own)


def _share(entries: list[Credit], group: list[Credit]) -> None:
    """The last writer of a block carries the noise that credits all writers of its width."""
    last = group[-1]
    for entry in group:
        i = entries.index(entry)
        if entry is last:
            entries[i] = replace(entry, why="last to write to the residual stream in its block")
        elif entry.m == last.m and entry.axis == last.axis:
            entries[i] = replace(
                entry, source=last.index, why="writes to the residual stream of the same block"
            )


def _why_not(p: nn.Parameter, owners: list[tuple[str, nn.Module, str]], block: str | None) -> str:
    """Why a parameter is not credited, empty where it is."""
    path, module, attribute = owners[0]
    kind = type(module).__name__
    if p.dim() != 2 or attribute != "weight":
        return f"{'norm' if is_norm(module) else attribute} of {kind}: only weights are credited"
    if matrix_kind(module, attribute) not in ("Linear", "Conv1D"):
        return f"{kind} is no Linear or Conv1D that runs its own forward"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{kind} computes its product by code of its own"
    if block is None:
        return "outside the model's blocks"
    if len(owners) > 1:
        return f"shared with {owners[1][0]}"
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"{p.dtype} is not fp32, bf16 or fp16"
    if not p.is_contiguous():
        return "not contiguous in memory"
    if re.search(r"\bexperts\b", path):
        return "an expert sees a choice of rows"
    return ""


def _leaf(path: str) -> str:
    return path.removesuffix(".base_layer").rpartition(".")[2]


def _axis(model: nn.Module, path: str) -> str:
    """Whose tokens a module's rows are."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "main"
    parts = path.split(".")
    in_decoder = "decoder" in parts
    crossed = _CROSS_ATTENTION.search(path) and parts[-1] in {
        "k", "v", "k_proj", "v_proj", "key", "value",
    }  # fmt: skip
    return "main" if in_decoder and not crossed else "encoder"


def _why_own(model: nn.Module, blocks: list[nn.Module]) -> str:
    """Why noise on a block's last linear would not enter the residual stream as it is, or ''."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "own credit: encoder-decoder"
    causal = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", 0), bool)]
    named = type(getattr(model, "get_base_model", lambda: model)()).__name__
    if config is not None and not (any(causal) or named.endswith(("ForCausalLM", "LMHeadModel"))):
        return "own credit: an encoder"
    for block in blocks:
        if getattr(block, "do_layer_norm_before", True) is False:
            return "own credit: the norm follows the residual sum"
        for name, _ in block.named_modules():
            leaf = name.rpartition(".")[2]
            if _OUTPUT_NORM.fullmatch(leaf) or leaf == "LayerNorm":
                return f"own credit: {name} norms an output before or as it joins the stream"
            if leaf == "post_attention_layernorm" and not hasattr(block, "input_layernorm"):
                return f"own credit: {name} norms an output before it joins the stream"
    return ""


def blocks_in_order(model: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """The one list of blocks of a decoder: its name and blocks; None with several lists or none."""
    lists = outer_lists(model)
    if len(lists) != 1:
        return None
    return lists[0][0], list(lists[0][1])


def first_noisy_block(model: nn.Module, plan: CreditPlan) -> int:
    """Position of the first block with a noisy linear in it."""
    found = blocks_in_order(model)
    assert found is not None
    counts = Counter(
        int(e.name.removeprefix(f"{found[0]}.").partition(".")[0])
        for e in plan.entries
        if e.noisy and e.name.startswith(f"{found[0]}.")
    )
    return min(counts)
