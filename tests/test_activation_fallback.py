"""Models whose queries cannot cost a row: why is named, and whole groups serve all the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_activation_rows import WORDS, padded
from tiny_models import build
from torch import Tensor, nn

from subzero import SubZero, label_words, next_token, row_queries


def test_a_model_of_another_kind_falls_back() -> None:
    """Why a query costs whole groups is named, and the step works all the same."""
    cases = {
        "bloom": "attention by code of its own",
        "gptj": "attention by code of its own",
        "mamba": "attention by code of its own|not a causal|takes no position_ids",
        "bert": "no causal language-model head",
    }
    for name, why in cases.items():
        model = build(name)
        opt = SubZero(model, noise="activation", rank=2, queries=4, rule="norm", lr=0.1)
        assert opt._queries._decoder is None
        assert any(part in opt.plan().whole_groups for part in why.split("|")), name
        assert "queries: whole groups" in str(opt.plan())
        b = padded("no")
        unread: list[str] = []
        if name == "mamba":  # reads this weight outside its module, and says so
            unread = [e.name for e in opt.plan().entries if "dt_proj" in e.name]
            assert unread
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.warns(UserWarning, match="dt_proj.*no part") if unread else nullcontext():
            assert opt.step(b, label_words(WORDS)).isfinite()
        opt.fold()
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert moved == [e.name for e in opt.plan().entries if e.name not in unread], name
    everywhere = SubZero(build("llama"), noise="activation", rank=2, where="all")
    assert everywhere.plan().whole_groups == "where='all' puts noise into every row"


class Plain(nn.Module):
    """A module of no library, with blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 96)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.head(h)


def test_a_plain_module_takes_a_logits_loss() -> None:
    """Whole groups; the logits are read from whatever the module returns."""
    model = Plain()
    opt = SubZero(model, noise="activation", rank=3, queries=2, lr=1.0, credit="own")
    assert opt.plan().whole_groups == "not a causal language model of transformers"
    before = model.blocks[1].weight.detach().clone()
    opt.step({"input_ids": torch.arange(12).view(3, 4), "labels": torch.arange(3)},
             label_words(WORDS))  # fmt: skip
    opt.fold()
    assert not torch.equal(model.blocks[1].weight, before)


@pytest.mark.parametrize("fault", ["values", "raises", "shapes"])
def test_decoding_that_differs_is_found(fault: str) -> None:
    """A wrong attention is noticed on the first step; that step and all later ones are right."""
    from transformers import AttentionInterface

    plain, b, results = row_queries.attend, padded("left"), []

    def wrong(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kw: Any) -> Any:
        if fault == "raises":
            raise TypeError("no such argument")
        if fault == "shapes":
            key = key.view(1, 2, 3)
        return plain(module, query, key, value + 0.1, *rest, **kw)

    for attention in (plain, wrong):
        model = build("llama", dtype=torch.float64)
        opt = SubZero(model, noise="activation", rank=3, queries=3, rule="norm", lr=0.1)
        if attention is wrong:
            AttentionInterface.register(row_queries._NAME, wrong)
        try:
            for _ in range(2):
                opt.step(b, next_token())
        finally:
            AttentionInterface.register(row_queries._NAME, plain)
        whole = opt.plan().whole_groups
        assert (whole == "") == (attention is plain)
        if attention is wrong:
            named = {"values": "differ", "raises": "TypeError: no such", "shapes": "RuntimeError"}
            assert named[fault] in whole
        opt.fold()
        results.append(torch.cat([e.param.detach().flatten() for e in opt.plan().entries]))
    start = torch.cat(
        [dict(build("llama", dtype=torch.float64).named_parameters())[e.name].detach().flatten()
         for e in opt.plan().entries]
    )  # fmt: skip
    moved = (results[0] - start).norm()
    assert moved > 0.1 and (results[1] - results[0]).norm() < 1e-9 * moved


def test_a_cache_of_another_kind_falls_back() -> None:
    """DeepSeek's latent cache holds no keys: found out in the first step, which then works."""
    model = build("deepseek")
    opt = SubZero(model, noise="activation", rank=3, queries=4, rule="norm", lr=0.1)
    assert opt.step(padded("left"), label_words(WORDS)).isfinite()
    assert "decoding on its cache failed: RuntimeError" in opt.plan().whole_groups
    before = {e.name: e.param.detach().clone() for e in opt.plan().entries}
    opt.fold()
    assert all(not torch.equal(e.param, before[e.name]) for e in opt.plan().entries)


def test_padding_is_tried_as_well() -> None:
    """A cache that serves full rows only is found out before the first batch with a mask."""
    model = build("llama", dtype=torch.float64)
    opt = SubZero(model, noise="activation", rank=3, queries=4)
    decoder = opt._queries._decoder
    assert decoder is not None
    plain = decoder._visible

    def blind(at: Tensor) -> Any:  # sees padding
        seen = plain(at)
        seen.prefix[:] = torch.arange(9) < decoder._first[:, None, None]
        return seen

    decoder._visible = blind  # type: ignore[method-assign]
    b = padded("no")
    opt.step({k: v for k, v in b.items() if k != "attention_mask"}, label_words(WORDS))
    assert opt.plan().whole_groups == ""
    opt.step(b, label_words(WORDS))
    assert "differ from the forward" in opt.plan().whole_groups
