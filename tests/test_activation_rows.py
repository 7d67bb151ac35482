"""Queries that cost a row equal the plain evaluation with K + 1 whole groups, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build
from torch import Tensor, nn

from subzero import LogitsLoss, SubZero, label_words, next_token, row_queries

WORDS = [5, 11, 17]
# linears that queries and keys come from, and those that write to the residual stream
TRAINED = (
    "q_proj", "qkv_proj", "c_attn", "query_key_value", "o_proj", "out_proj", "dense.", "c_proj",
    "down_proj", "fc2", "dense_4h_to_h",
)  # fmt: skip
CAUSAL = [
    "llama", "llama untied", "qwen2", "qwen3", "gemma", "opt", "gpt2", "mistral", "qwen2 sliding",
    "gemma3", "phi", "phi3", "gpt_neox", "mixtral", "olmo2", "opt post-norm",
]  # fmt: skip


def padded(side: str, examples: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    """Sequences of 9, 6 and 7 tokens, padded on one side; windows of 3 are far shorter."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 96, (examples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, short in ((1, 3), (2, 2)):
        if side == "left":
            mask[row, :short] = 0
        elif side == "right":
            mask[row, tokens - short :] = 0
    labels = torch.arange(examples) % len(WORDS)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scattered(b: dict[str, Tensor]) -> Tensor:
    """Some real tokens, unscored ones between them; one, two and three of an example."""
    mask = torch.zeros_like(b["input_ids"], dtype=torch.bool)
    for row, chosen in enumerate([(3, 5, 8), (2,), (4, 6)]):
        real = b["attention_mask"][row].nonzero()[:, 0]
        for t in chosen:
            mask[row, real[min(t, len(real) - 1)]] = True
    return mask


def squares(logits: Tensor, b: Any) -> Tensor:
    """A smooth loss of all logits read, (examples, P)."""
    return logits.sin().square().mean(-1)


Case = tuple[str, LogitsLoss, Callable[[dict[str, Tensor]], Tensor] | None]


def cases() -> list[Case]:
    """Labels, all tokens, scattered positions; no padding, and padding on either side."""
    summed = LogitsLoss(lambda logits, b: squares(logits, b).sum(1))
    return [
        ("no", LogitsLoss(squares), scattered),
        ("left", label_words(WORDS), None),
        ("left", next_token(), None),
        ("left", next_token(), scattered),
        ("left", LogitsLoss(squares), scattered),
        ("right", label_words(WORDS), None),
        ("right", LogitsLoss(squares), scattered),
        ("right", next_token(), scattered),
        ("right", summed, last_of_all),
    ]


def last_of_all(b: dict[str, Tensor]) -> Tensor:
    """The second and the last token of each: summed losses have no entries beyond an example's."""
    real = b["attention_mask"]
    return (real.cumsum(1) == 2) & (real == 1) | (real.flip(1).cumsum(1).flip(1) == 1) & (real == 1)


def compare(opt: SubZero, chosen: Iterable[Case], tolerance: float = 1e-9) -> None:
    """Losses by rows and by whole groups are the same."""
    for side, objective, positions in chosen:
        b = padded(side)
        mask = None if positions is None else positions(b)
        rows, groups = (losses(opt, b, objective, mask, whole) for whole in (False, True))
        close(rows, groups, tolerance)


def optimizer(model: nn.Module, **options: Any) -> SubZero:
    """One real step first, so that the side path is not zero."""
    base = dict(lr=1e-2, eps=1e-3, rank=3, queries=4, noise="activation", seed=2)
    for name, p in model.named_parameters():  # a few places in each block are enough
        p.requires_grad_(p.requires_grad and any(part in name for part in TRAINED))
    opt = SubZero(model, **{**base, **options})
    opt.step(padded("no"), label_words(WORDS))
    assert opt._queries._decoder is not None, opt.plan().whole_groups
    return opt


def losses(opt: SubZero, b: Any, objective: Any, positions: Any, whole: bool) -> Tensor:
    """Clean losses and differences of a step that changes nothing: flat, one vector."""
    queries, got = opt._queries, []
    decoder, weigh = queries._decoder, queries._weigh

    def spy(micros: Any, eps: float) -> Any:
        for m in micros:
            got.extend([m.clean.flatten(), m.differences.flatten() / eps])
        return weigh(micros, eps)

    opt.param_groups[0]["lr"] = 0.0
    if whole:
        queries._decoder = None
    queries._weigh = spy  # type: ignore[method-assign]
    try:
        opt.draws = 40
        opt.step(b, objective, positions)
        assert whole or queries._decoder is decoder, opt.plan().whole_groups
    finally:
        queries._decoder, queries._weigh = decoder, weigh  # type: ignore[method-assign]
    return torch.cat(got)


def close(rows: Tensor, groups: Tensor, tolerance: float = 1e-9) -> None:
    """Equal to the rounding of float64 losses, divided by eps."""
    assert groups.abs().max() > 1e-4
    assert (rows - groups).norm() <= tolerance * groups.norm(), float((rows - groups).norm())


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_equal_whole_groups(name: str) -> None:
    """Labels, all tokens, scattered positions; no padding, and padding on either side."""
    model = build(name, dtype=torch.float64)
    opt = optimizer(model, credit="block" if len(name) % 2 else "own")
    compare(opt, cases())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "phi"])
def test_eager_attention(name: str) -> None:
    """Families that keep their softmax in fp32 when eager keep it so in a decoded row.

    A row that sees nothing is NaN in transformers' own eager attention in float64: no padding on
    the left, and none at all with a window.
    """
    model = build(name, dtype=torch.float64)
    model.set_attn_implementation("eager")
    opt = optimizer(model)
    sides = ("no",) if name in ("gemma2", "mistral") else ("no", "right")
    compare(opt, [c for c in cases() if c[0] in sides], 1e-3)  # fp32 rounding over eps


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_leading_blocks_are_passed_by(name: str) -> None:
    """Blocks in front of the first noisy one run once, in the clean forward."""
    model = build(name, dtype=torch.float64)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks[0].requires_grad_(False)
    opt, b = optimizer(model), padded("left")
    compare(opt, [c for c in cases() if c[0] == "left"])
    runs = [0]
    linear = next(m for m in blocks[0].modules() if type(m).__name__ in ("Linear", "Conv1D"))
    handle = linear.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    losses(opt, b, label_words(WORDS), None, False)
    handle.remove()
    assert runs[0] == 1


def test_many_queries_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 128 in one chunk and in many, by rows and by scores, give the same losses."""
    model = build("llama", dtype=torch.float64)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.requires_grad_(False)
    opt, b = optimizer(model, queries=128), padded("left")
    losses(opt, b, label_words(WORDS), None, False)  # tried with padding
    calls = count_forwards(model)
    together = losses(opt, b, label_words(WORDS), None, False)
    assert calls == [1, 1]  # the clean forward, all queries
    for name, value in (("_CHUNK_ROWS", 30), ("_CHUNK_SCORES", 4 * 10 * 3 * 16)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(row_queries, name, value)
            parts = losses(opt, b, label_words(WORDS), None, False)
        assert len(calls) == 1 + (13 if name == "_CHUNK_ROWS" else 8), name
        close(parts, together, 1e-10)
    close(together, losses(opt, b, label_words(WORDS), None, True))


def count_forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("objective", [label_words(WORDS), next_token()], ids=["label", "tokens"])
def test_the_prefix_is_read_and_not_copied(
    objective: LogitsLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of B sequences serve K B rows: the clean forward's own tensors, and none K times as big.

    Every tensor an operation of a query's attention makes is seen; one that held the prefix's
    keys K times would have K B kv_heads T d numbers.
    """
    queries, tokens = 64, 9
    model = build("llama", dtype=torch.float64)
    opt = optimizer(model, queries=queries)
    seen: list[int] = []
    largest = [0]
    plain = row_queries.attend

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    largest[0] = max(largest[0], t.untyped_storage().nbytes() // 8)
            return out

    def watched(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        past = row_queries._active[-1].keys[module.layer_idx][0]
        seen.append(past.shape[0])
        with Watch():
            return plain(module, query, key, value, *args, **kw)

    from transformers import AttentionInterface

    AttentionInterface.register(row_queries._NAME, watched)
    try:
        losses(opt, padded("no"), objective, None, False)
    finally:
        AttentionInterface.register(row_queries._NAME, plain)
    assert seen and set(seen) == {3}
    if objective.tokens:  # one row a query: all that is made is smaller than a copy would be
        copies = queries * 3 * 2 * tokens * 8
        assert largest[0] < copies


def test_packed_rows_are_whole_groups() -> None:
    """Two sequences in a row need a mask of their own: that batch is evaluated as whole groups."""
    model = build("llama", dtype=torch.float64)
    opt = optimizer(model)
    calls = count_forwards(model)
    b = {k: v for k, v in padded("no").items() if k != "labels"}
    b["position_ids"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, -1)
    opt.step(b, next_token())
    assert len(calls) == 1 and opt.plan().whole_groups == ""
    calls.clear()
    one = opt._queries.bind({**b, "position_ids": b["position_ids"][:1]}, next_token(), None)
    every = opt._queries.bind(b, next_token(), None)
    assert torch.equal(one[0].grid.ids, every[0].grid.ids) and int(one[0].grid.next) == 6
    opt.step({**b, "position_ids": b["position_ids"][:1]}, next_token())  # one row for all
    assert len(calls) == 1
    calls.clear()
    opt.step({**b, "position_ids": torch.arange(9)[None]}, next_token())
    assert len(calls) == 2


def test_an_example_without_a_scored_token() -> None:
    """It has no noise and no loss that is read; the others are as ever."""
    opt = optimizer(build("llama", dtype=torch.float64))
    b = padded("left")
    mask = scattered(b)
    mask[1] = False
    rows, groups = (losses(opt, b, LogitsLoss(squares), mask, whole) for whole in (False, True))
    close(rows, groups)
    b = {k: v for k, v in padded("no").items() if k != "labels"}
    b["attention_mask"][1, 1:] = 0  # one token has no successor
    rows, groups = (losses(opt, b, next_token(), None, whole) for whole in (False, True))
    close(rows, groups)


def test_one_example_and_answers_of_many_tokens() -> None:
    """B = 1, and a long answer after a short prompt, as labels mark it."""
    model = build("gpt2", dtype=torch.float64)
    opt = optimizer(model)
    ids = torch.randint(4, 96, (1, 12))
    labels = torch.where(torch.arange(12) < 4, -100, ids)

    def answer(logits: Tensor, b: Any) -> Tensor:
        wanted = b["labels"][:, 4:]
        return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(1)

    b = {"input_ids": ids, "labels": labels}
    rows, groups = (losses(opt, b, LogitsLoss(answer), None, whole) for whole in (False, True))
    close(rows, groups)
