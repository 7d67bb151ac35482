"""Supervised fine-tuning with SubZeroTrainer on rows of TRL's form: a prompt and its completion.

    python examples/trainer.py MODEL ROWS.jsonl OUTPUT [--max_steps 500 ...]

Options are those of SubZeroConfig. A row is {"prompt": "...", "completion": "..."};
only the completion's tokens are learnt. The last tenth of the rows is the dev set: it is evaluated
while training, and the best weights are kept.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
)

from subzero import SubZeroConfig, SubZeroTrainer


def main(arguments: list[str]) -> SubZeroTrainer:
    name, rows, output, *options = arguments
    (args,) = HfArgumentParser(SubZeroConfig).parse_args_into_dataclasses(
        ["--output_dir", output, "--load_best_model_at_end", "--eval_strategy", "steps", *options]
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name)

    def encode(row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        answer += [tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    data = load_dataset("json", data_files=rows, split="train")
    data = data.map(encode, remove_columns=data.column_names)
    parts = data.train_test_split(0.1, shuffle=False)
    trainer = SubZeroTrainer(
        model,
        args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        # lengths in buckets of 64: few shapes, so that steps on a GPU are replayed CUDA graphs
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
