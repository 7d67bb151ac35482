"""Whole models with random weights, made on the device from transformers configs, and batches."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

LABEL_WORDS = [7, 11]  # two tokens of the vocabulary, the classes of every example


def _opt(layers: int, width: int, heads: int) -> tf.PretrainedConfig:
    return tf.OPTConfig(
        vocab_size=50272, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2048,
    )  # fmt: skip


def _llama3_8b() -> tf.PretrainedConfig:
    return tf.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip


CONFIGS = {
    "OPT-13B": _opt(40, 5120, 40),
    "Llama-3-8B": _llama3_8b(),
    "OPT-1.3B": _opt(24, 2048, 32),
}


def narrow(config: tf.PretrainedConfig) -> tf.PretrainedConfig:
    """As many launches as the model has, with next to no arithmetic: its host time is seen."""
    small = copy.deepcopy(config)
    small.vocab_size, small.hidden_size = 128, 64
    small.num_attention_heads = 4
    if isinstance(small, tf.OPTConfig):
        small.word_embed_proj_dim, small.ffn_dim = 64, 128
    else:
        small.intermediate_size, small.head_dim, small.num_key_value_heads = 128, 16, 2
    return small


def build(config: tf.PretrainedConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """In eval mode. Norm weights are 1 and biases 0, which costs the same."""
    torch.manual_seed(0)
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


class Tokens(NamedTuple):
    """examples x length tokens a batch, written "16x32"."""

    examples: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Tokens:
        examples, length = map(int, text.split("x"))
        return cls(examples, length)

    def __str__(self) -> str:
        return f"{self.examples}x{self.length}"


def make_batch(tokens: Tokens, vocabulary: int, device: str, padded: bool) -> dict[str, Tensor]:
    """Token ids and classes; ``padded``: an eighth of the first example is padding, on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, tokens, generator=generator)
    labels = torch.randint(0, len(LABEL_WORDS), (tokens.examples,), generator=generator)
    batch = {"input_ids": ids, "labels": labels}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, : max(1, tokens.length // 8)] = 0
        batch["attention_mask"] = mask
    return {name: t.to(device) for name, t in batch.items()}


# Tokens of 16 sentences of SST-2's training set, words and 3 of the prompt counted: of batches
# drawn at random, one with the median share of padding.
SST2 = (19, 23, 22, 36, 6, 33, 9, 14, 17, 38, 7, 31, 22, 24, 20, 19)


def sentences(vocabulary: int, device: str) -> dict[str, Tensor]:
    """A batch of sentences as long as :data:`SST2` says, padded on the left."""
    batch = make_batch(Tokens(len(SST2), max(SST2)), vocabulary, device, padded=False)
    column = torch.arange(max(SST2), device=device)
    real = column >= max(SST2) - torch.tensor(SST2, device=device)[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return {**batch, "attention_mask": real.long(), "position_ids": positions}


def plain_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(examples,) fp32, of a plain forward: logits at the last position only."""
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    words = logits.index_select(1, _words(logits.device)).float()
    return F.cross_entropy(words, batch["labels"], reduction="none")


@functools.cache
def _words(device: torch.device) -> Tensor:
    """On the device: a captured forward cannot copy them there."""
    return torch.tensor(LABEL_WORDS, device=device)
