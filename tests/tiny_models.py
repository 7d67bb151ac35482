"""Tiny random models of real architectures, and what the tests ask of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

SIZE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def _llama() -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **SIZE, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
        )
    )


def _qwen() -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZE, intermediate_size=48, num_key_value_heads=2))


def _qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(
        tf.Qwen3Config(**SIZE, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    )


def _gemma() -> nn.Module:
    return tf.GemmaForCausalLM(
        tf.GemmaConfig(**SIZE, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    )


def _opt() -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(**SIZE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    )


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def _bert() -> nn.Module:
    return tf.BertForMaskedLM(
        tf.BertConfig(**SIZE, intermediate_size=48, max_position_embeddings=64)
    )


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def _mixtral() -> nn.Module:
    model = tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **SIZE,
            intermediate_size=48,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )
    model.set_experts_implementation(
        "eager"
    )  # the grouped kernel takes no float64, the oracle's dtype
    return model


BUILDERS = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "mixtral": _mixtral,
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model in eval mode; norms and biases get random values, so that they matter."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def batch(examples: int = 3, tokens: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Token ids, left-padded in the first example."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 96, (examples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if examples > 1:
        mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def per_example(model: nn.Module) -> Any:
    """batch -> (examples,): mean cross entropy of each token's own successor."""

    def loss(b: dict[str, Tensor]) -> Tensor:
        ids = b["input_ids"]
        extra = {"decoder_input_ids": ids} if "decoder" in dict(model.named_children()) else {}
        logits = model(**b, **extra).logits
        return F.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none"
        ).mean(1)

    return loss


def closure(model: nn.Module, b: dict[str, Tensor]) -> Any:
    """The same objective as a scalar, through plain forwards."""
    return lambda: per_example(model)(b).mean()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(p.detach().view(torch.uint8), before[name].view(torch.uint8))
        for name, p in model.named_parameters()
    )
