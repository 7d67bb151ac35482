"""The examples run as they stand, on a tiny model and rows of our own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from tiny_task import llama, sentences, tokenizer
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop_learns() -> None:
    before, after = load("plain_loop").main()
    assert after < 0.8 * before


def test_trainer_on_prompts_and_completions(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.save_pretrained(tmp_path / "model")
    llama(len(tok)).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{text} It was", "completion": (" terrible", " great")[label]}
        for text, label in sentences()
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    options = "--max_steps 4 --eval_steps 2 --save_steps 2 --rank 4 --learning_rate 1e-3"
    options += " --report_to none --use_cpu True --disable_tqdm True"
    trainer = load("trainer").main([str(tmp_path / "model"), str(data), str(out), *options.split()])
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([tok("the film is good It was")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, trainer.model.eval()(ids).logits)
