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


GROUPED = dict(**SIZE, intermediate_size=48, num_key_value_heads=2)
WINDOW = 3  # of the models with sliding windows, shorter than a batch's sequences


def _llama_untied() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=False))


def _mistral() -> nn.Module:
    return tf.MistralForCausalLM(
        tf.MistralConfig(**GROUPED, head_dim=8, sliding_window=WINDOW, tie_word_embeddings=False)
    )


def _qwen2_sliding() -> nn.Module:
    config = tf.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return tf.Qwen2ForCausalLM(config)


def _gemma2() -> nn.Module:
    return tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW)
    )


def _gemma3() -> nn.Module:
    config = tf.Gemma3TextConfig(
        **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return tf.Gemma3ForCausalLM(config)


def _phi() -> nn.Module:
    return tf.PhiForCausalLM(tf.PhiConfig(**GROUPED, partial_rotary_factor=0.5))


def _phi3() -> nn.Module:
    return tf.Phi3ForCausalLM(
        tf.Phi3Config(**GROUPED, sliding_window=WINDOW, pad_token_id=0, bos_token_id=1,
                      eos_token_id=2)
    )  # fmt: skip


def _gpt_neox() -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZE, intermediate_size=48, rotary_pct=0.5))


def _bloom() -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))


def _gptj() -> nn.Module:
    return tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    )


def _falcon() -> nn.Module:
    return tf.FalconForCausalLM(tf.FalconConfig(**SIZE, new_decoder_architecture=False))


def _mamba() -> nn.Module:
    return tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def _deepseek() -> nn.Module:
    """Latent attention: its cache holds no keys of heads."""
    config = tf.DeepseekV3Config(
        **{**GROUPED, "num_key_value_heads": 4}, first_k_dense_replace=2, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


def _olmo2() -> nn.Module:
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED))


def _opt_post_norm() -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            **SIZE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32,
            do_layer_norm_before=False,
        )
    )  # fmt: skip


# further architectures, for tests that ask for them by name
MORE = {
    "llama untied": _llama_untied,
    "mistral": _mistral,
    "qwen2 sliding": _qwen2_sliding,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "gptj": _gptj,
    "falcon": _falcon,
    "mamba": _mamba,
    "deepseek": _deepseek,
    "olmo2": _olmo2,
    "opt post-norm": _opt_post_norm,
}


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> nn.Module:
    """A random model in eval mode; norms and biases get random values, so that they matter.

    layers: as many of one kind, instead of two.
    """
    torch.manual_seed(seed)
    model = {**BUILDERS, **MORE}[name]().eval()
    if layers is not None:
        config = model.config
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[0]] * layers
        config.num_hidden_layers = layers
        model = type(model)(config).eval()
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
