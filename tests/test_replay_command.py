"""``subzero replay``: what it writes loads in plain transformers; one line for each error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import same_bits, snapshot
from tiny_task import save_model
from transformers import AutoModelForCausalLM

from subzero import SubZero
from subzero.errors import CommandError
from subzero.replay import replay


@pytest.fixture
def recorded(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A run that trained all but the embedding; its weights."""
    save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    opt = SubZero(model, lr=1e-2, eps=1e-2, rank=4, refresh_every=2, seed=3)
    opt.record(tmp_path / "t.jsonl")
    ids = torch.arange(3, 11).view(1, 8)
    for _ in range(5):
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    opt.detach()
    return snapshot(model)


def test_the_folder_holds_the_weights_of_the_run(
    tmp_path: Path, recorded: dict[str, torch.Tensor]
) -> None:
    replay(f"{tmp_path}/model", f"{tmp_path}/t.jsonl", f"{tmp_path}/tuned", device="cpu")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    assert same_bits(tuned, recorded)


def test_errors_are_one_line_and_write_nothing(tmp_path: Path, recorded: object) -> None:
    model, out = f"{tmp_path}/model", tmp_path / "tuned"
    with pytest.raises(CommandError, match="got no file"):
        replay(model, f"{tmp_path}/none", str(out), device="cpu")
    with pytest.raises(CommandError, match="dtype of the run"):
        replay(model, f"{tmp_path}/t.jsonl", str(out), dtype="bfloat16", device="cpu")
    (tmp_path / "t.jsonl").write_bytes((tmp_path / "t.jsonl").read_bytes()[:-3])
    with pytest.raises(CommandError, match="--drop-torn"):
        replay(model, f"{tmp_path}/t.jsonl", str(out), device="cpu")
    assert not out.exists()
