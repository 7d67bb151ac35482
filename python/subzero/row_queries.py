"""Queries that cost a row: the scored positions decoded on the clean forward's keys and values.

In a causal model noise at the rows the loss reads changes nothing in front of them. So the clean
forward runs once with its cache, and each query runs the rows from the first scored one to the
last (one row for a label), from the first noisy block on. All K queries attend to one copy of the
prefix: their rows are laid side by side as further queries of the same keys, and attend among
themselves.

With T tokens a sequence, A of them in the decoded span and a share f of the blocks from the first
noisy one on, a step costs 1 + K f A / T forwards instead of K + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .activation import NoisyRows
from .credit import CreditPlan, blocks_in_order, first_noisy_block
from .heads import forward_names
from .micros import Micro
from .rows import take

# Queries are decoded as many at a time as keep a chunk below these: rows, and attention scores.
_CHUNK_ROWS = 8192
_CHUNK_SCORES = 1 << 27
_NAME = "subzero_rows"

# How far logits decoded without noise may be from the clean forward's, relative to their norm.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}


def why_whole_groups(model: nn.Module, plan: CreditPlan, where: str) -> str:
    """Why a query of this model cannot cost a row, or ''."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    if where != "loss":
        return f"where={where!r} puts noise into every row"
    if config is None or not hasattr(base, "_supports_attention_backend"):
        return "not a causal language model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if not type(base).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return f"{type(base).__name__} has no causal language-model head"
    if not base._supports_attention_backend:
        return f"{type(base).__name__} computes attention by code of its own"
    if "position_ids" not in forward_names(model):
        return "its forward takes no position_ids"
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        return f"its cache holds more than keys and values ({', '.join(sorted(others))})"
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return "prompt learning puts virtual tokens in front of the batch"
    if blocks_in_order(model) is None:
        return "more than one list of blocks"
    return ""


@dataclass
class _Attention:
    """What the attention of a decoding pass sees beside its own rows."""

    keys: dict[int, tuple[Tensor, Tensor]]  # by the attention's layer_idx
    prefix: Tensor  # (B, L, T) bool: cached tokens a row may attend to, before any window
    own: Tensor  # (B, L, L) bool: rows of the same query it may attend to
    first: Tensor  # (B,) index of the first row
    exact_softmax: bool
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def unseen(self, window: int | None) -> Tensor:
        """(B, 1, L, T + L) bool: what a row may not attend to, beyond a sliding window too."""
        if window not in self.masks:
            prefix, own = self.prefix, self.own
            if window is not None:
                rows = torch.arange(prefix.shape[1], device=prefix.device)
                at = self.first[:, None] + rows
                cached = torch.arange(prefix.shape[2], device=prefix.device)
                prefix = prefix & (at[..., None] - cached < window)
                own = own & (rows[:, None] - rows < window)
            self.masks[window] = ~torch.cat([prefix, own], 2)[:, None]
        return self.masks[window]


_active: list[_Attention] = []


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention of K queries' rows over one shared prefix and their own rows.

    query (K B, heads, L, d), key and value (K B, kv heads, L, d), query-major; the prefix's keys
    and values (B, kv heads, T, d) are read once for all K.

    Returns:
        (K B, L, heads, d), as transformers' attention functions do.
    """
    seen = _active[-1]
    past_key, past_value = seen.keys[module.layer_idx]
    examples, kv_heads, cached, width = past_key.shape
    rows, heads, length = query.shape[:3]
    queries, shared = rows // examples, heads // kv_heads
    scaling = options.get("scaling")
    scaling = width**-0.5 if scaling is None else scaling
    # (B, kv heads, K shared L, d): one product with the prefix, whatever K is
    grouped = query.view(queries, examples, kv_heads, shared, length, width)
    if scaling != 1:
        grouped = grouped * scaling
    side_by_side = grouped.permute(1, 2, 0, 3, 4, 5).reshape(examples, kv_heads, -1, width)
    past = (side_by_side @ past_key.mT).view(examples, kv_heads, queries, shared, length, cached)
    own_key = key.view(queries, examples, kv_heads, 1, length, width)
    own_value = value.view(queries, examples, kv_heads, 1, length, -1)
    if length == 1:  # a row that sees itself: no product of matrices
        own = (grouped * own_key).sum(-1, keepdim=True)
    else:
        own = grouped @ own_key.mT
    scores = torch.cat([past, own.permute(1, 2, 0, 3, 4, 5)], -1)
    softcap = options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    unseen = seen.unseen(options.get("sliding_window"))[:, :, None, None]
    scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
    sinks = options.get("s_aux")
    if sinks is not None:
        sink = sinks.view(kv_heads, 1, shared, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], -1)
    # sums are in fp32 whatever the dtype is; eager attention takes fp32 for float64 as well
    wide = torch.float32 if seen.exact_softmax and scores.dtype == torch.float64 else None
    weights = torch.softmax(scores, -1, dtype=wide)[..., : cached + length].to(value.dtype)
    past_weights = weights[..., :cached].reshape(examples, kv_heads, -1, cached)
    out = (past_weights @ past_value).view(*scores.shape[:-1], -1)
    own_weights = weights[..., cached:].permute(2, 0, 1, 3, 4, 5)
    from_own = own_value * own_weights if length == 1 else own_weights @ own_value
    out = from_own + out.permute(2, 0, 1, 3, 4, 5)  # in the order of rows: no copy follows
    return out.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


class RowDecoder:
    """Runs the clean forward with its cache, then queries as rows on it."""

    def __init__(self, model: nn.Module, plan: CreditPlan) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_NAME, attend)
        self.model = model
        found = blocks_in_order(model)
        assert found is not None
        first = first_noisy_block(model, plan)
        self._leading, self._branch = found[1][:first], found[1][first]
        later: list[Any] = [m for block in found[1][first:] for m in block.modules()]
        self._layers = {m.layer_idx for m in later if isinstance(getattr(m, "layer_idx", 0.5), int)}
        configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
        configs = [c for c in configs if hasattr(c, "_attn_implementation")]
        self._configs = list({id(c): c for c in configs}.values())

    # the clean forward

    @contextmanager
    def recording(self, micro: Micro) -> Iterator[dict[str, Any]]:
        """Around the clean forward: what to pass to the model; then queries decode on it."""
        assert micro.index is not None and micro.extent is not None
        cache = _recorder(self._layers)
        hidden: list[Tensor] = []
        kind: list[Any] = []
        self._grid, self._length = micro.grid, micro.extent.length
        self._first = micro.index[:, 0]
        at = self._first[:, None] + torch.arange(self._length, device=micro.index.device)
        self._at = at.clamp(max=micro.grid.real.shape[1] - 1)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden.append(take(args[0] if args else kwargs["hidden_states"], self._at))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            kind.append(None if isinstance(output, Tensor) else output[1:])

        handles = [self._branch.register_forward_pre_hook(before, with_kwargs=True)]
        if self._leading:
            handles.append(self._leading[-1].register_forward_hook(after))
        try:
            yield {"past_key_values": cache, "use_cache": True}
        finally:
            for handle in handles:
                handle.remove()
        self._cache: dict[int, tuple[Tensor, Tensor]] = cache.kept
        self._rest = kind[0] if kind else None
        self._hidden = hidden[0]
        self._attention = self._visible(at)

    def _visible(self, at: Tensor) -> _Attention:
        grid = self._grid
        tokens = torch.arange(grid.real.shape[1], device=at.device)
        in_front = grid.real & (tokens < self._first[:, None])
        prefix = in_front[:, None].expand(-1, self._length, -1)
        real = take(grid.real, self._at) & (at < grid.real.shape[1])
        rows = torch.arange(self._length, device=at.device)
        own = (rows <= rows[:, None]) & real[:, None]
        own = own | torch.eye(self._length, dtype=torch.bool, device=at.device)
        exact = any(c._attn_implementation == "eager" for c in self._configs)
        return _Attention(self._cache, prefix, own, self._first, exact)

    # queries

    @property
    def rows(self) -> int:
        """Rows of one query: examples times the span's length."""
        return self._at.numel()

    def chunk(self) -> int:
        """How many queries to decode at a time."""
        key = next(iter(self._cache.values()))[0]
        heads = max(getattr(c.get_text_config(), "num_attention_heads", 1) for c in self._configs)
        scores = self.rows * heads * (key.shape[2] + self._length)
        return max(1, min(_CHUNK_ROWS // self.rows, _CHUNK_SCORES // scores))

    def noisy_rows(self, micro: Micro) -> NoisyRows:
        """The scored rows among those of a query, in the order of the micro-batch's entries."""
        assert micro.index is not None
        index = None
        if micro.index.shape[1] > 1 or self._length > 1:
            start = torch.arange(micro.examples, device=micro.index.device) * self._length
            index = (start[:, None] + self.within(micro.index)).flatten()
        return NoisyRows(self.rows, index, micro.ids.flatten(), micro.live.flatten())

    def within(self, index: Tensor) -> Tensor:
        """Positions (examples, P) as offsets in the span."""
        return (index - self._first[:, None]).clamp(0, self._length - 1)

    def inputs(self, batch: Any, queries: int) -> dict[str, Tensor]:
        """What the model's forward gets: tokens and positions of the span, queries times."""
        given = batch.get("position_ids")
        positions = self._at
        if given is not None:
            positions = take(given.expand(*batch["input_ids"].shape), self._at)
        tokens = take(batch["input_ids"], self._at)
        return {
            "input_ids": tokens.repeat(queries, 1),
            "position_ids": positions.repeat(queries, 1),
        }

    @contextmanager
    def decoding(self, queries: int) -> Iterator[None]:
        """Around a query's forward: leading blocks are passed by, attention sees the prefix."""

        def branch(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = self._hidden.repeat(queries, *[1] * (self._hidden.dim() - 1))
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        def pass_by(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if self._rest is None else (hidden, *self._rest)

        own = [block.__dict__.get("forward") for block in self._leading]
        implementations = [c._attn_implementation for c in self._configs]
        handle = self._branch.register_forward_pre_hook(branch, with_kwargs=True, prepend=True)
        _active.append(self._attention)
        try:
            for block in self._leading:
                block.forward = pass_by  # type: ignore[method-assign]
            for config in self._configs:
                config._attn_implementation = _NAME
            yield
        finally:
            _active.pop()
            handle.remove()
            for config, implementation in zip(self._configs, implementations, strict=True):
                config._attn_implementation = implementation
            for block, forward in zip(self._leading, own, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward  # type: ignore[method-assign]

    def forget(self) -> None:
        """Let the cache go, and what belongs to it."""
        self._cache = {}
        for name in ("_hidden", "_attention", "_first", "_at", "_grid", "_rest"):
            self.__dict__.pop(name, None)


def _recorder(layers: set[int]) -> Any:
    """A cache for one forward that keeps the keys and values of some layers as they come: not
    copied, and whole where a layer has a sliding window."""
    from transformers import DynamicCache

    class Recorder(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, tuple[Tensor, Tensor]] = {}

        def update(  # type: ignore[override]
            self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not layers or layer_idx in layers:
                self.kept[layer_idx] = key, value
            return key, value

    return Recorder()


def differs(decoded: Tensor, clean: Tensor, valid: Tensor) -> str:
    """Why decoding without noise does not give the clean logits (examples, P, ...), or ''."""
    wanted = clean[valid].double()
    error = (decoded[valid].double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    if float(error) <= _TOLERANCE.get(clean.dtype, 5e-2):
        return ""
    return f"rows decoded on its cache differ from the forward by {float(error):.1e}"
