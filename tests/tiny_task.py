"""A tiny random model with a real tokenizer, and sentences whose words give the label away."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILMS = ("film", "movie", "story", "script", "cast", "music", "ending", "plot")
GOOD = ("good", "lovely")
BAD = ("bad", "dull")


def sentences() -> list[tuple[str, int]]:
    """128 distinct sentences of differing length, half of each label."""
    rows = []
    for film, adverb in itertools.product(FILMS, ("", "very ", "so ", "quite ")):
        for label, words in enumerate((BAD, GOOD)):
            rows += [(f"the {film} is {adverb}{word}", label) for word in words]
    return rows


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which " great" and " terrible" are single tokens."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [f"{text} It was{word}" for text, _ in sentences() for word in (" great", " terrible")]
    tok.train_from_iterator(corpus, trainer)
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


def llama(vocab: int, **changes: Any) -> LlamaForCausalLM:
    """4 layers of width 32, tied head, seeded, in eval mode."""
    config = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def save_model(folder: Path) -> Path:
    """The model and its tokenizer, as transformers saves them."""
    tok = tokenizer()
    llama(len(tok)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def save_rows(path: Path, header: str = "text\tlabel") -> Path:
    """The sentences as TSV."""
    lines = [header, *(f"{text}\t{label}" for text, label in sentences())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
