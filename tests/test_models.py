"""Loading from a folder and from GGUF, choosing what is trained, and clear errors."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from tiny_task import llama, save_model, sentences, tokenizer

from subzero.errors import CommandError
from subzero.models import choose_trained, load_model, parse_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBZERO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path):
    """The tiny model as an unquantised GGUF of architecture llama."""
    import gguf

    tok = tokenizer()
    model = llama(len(tok))
    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tok))
    vocab = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    merges = json.loads(tok.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in vocab])
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def rows_as_llama_cpp(w, heads):
        """llama.cpp keeps the two halves of each rotary pair next to each other."""
        return w.view(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    state = model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    inner = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    for i in range(c.num_hidden_layers):
        names |= {f"blk.{i}.{a}": f"model.layers.{i}.{b}" for a, b in inner.items()}
    for ours, theirs in names.items():
        w = state[f"{theirs}.weight"]
        if ours.endswith(("attn_q", "attn_k")):
            heads = c.num_attention_heads if ours.endswith("q") else c.num_key_value_heads
            w = rows_as_llama_cpp(w, heads)
        writer.add_tensor(f"{ours}.weight", np.ascontiguousarray(w.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(model, tok):
    ids = tok([text for text, _ in sentences()[:3]], padding=False)["input_ids"]
    with torch.no_grad():
        return [model(torch.tensor([row])).logits for row in ids]


def same(a, b):
    return all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_folder(folder):
    loaded = load_model(str(folder), device="cpu")
    assert not loaded.model.training
    tok = tokenizer()
    assert same(logits(loaded.model, loaded.tokenizer), logits(llama(len(tok)), tok))
    assert load_model(str(folder), "bfloat16", "cpu").model.dtype == torch.bfloat16


def test_gguf_becomes_a_plain_model_once(tmp_path, cache):
    source = tmp_path / "gguf" / "Tiny.F32.gguf"
    source.parent.mkdir()
    original = write_gguf(source)
    loaded = load_model(str(source), device="cpu")
    assert loaded.label == "Tiny, dequantised F32"
    assert same(logits(loaded.model, loaded.tokenizer), logits(original, tokenizer()))
    (copy,) = cache.iterdir()
    assert not getattr(loaded.model.config, "quantization_config", None)
    written = os.stat(copy / "model.safetensors").st_mtime_ns
    load_model(str(source.parent), device="cpu")
    assert list(cache.iterdir()) == [copy]
    assert os.stat(copy / "model.safetensors").st_mtime_ns == written


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ([], "none/", "no such folder or file"),
        ([], "/none", "no such folder or file: /none"),
        (["a/readme.md"], "a", "expected a folder with config.json or one"),
        (["a/x.gguf", "a/y.gguf"], "a", r"holds several GGUF files \(x.gguf, y.gguf\)"),
        (["a/x.gguf"], "a", "cannot read .*x.gguf"),
        (["a.bin"], "a.bin", "expected a folder, a .gguf file or an id, got file"),
        (["a/config.json"], "a", "cannot load 'a'"),
        ([], "no-such-owner/no-such-model", "cannot load 'no-such-owner/no-such-model'"),
    ],
)
def test_models_that_cannot_be_loaded(tmp_path, monkeypatch, cache, files, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(CommandError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_bad_dtype_and_device(folder):
    with pytest.raises(CommandError, match="--dtype: expected one of float32, bfloat16, float16"):
        load_model(str(folder), "int8")
    with pytest.raises(CommandError, match="--device: cannot use 'abacus'"):
        load_model(str(folder), device="abacus")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("upper", [2, 3, 4]),
        ("none", []),
        ("3", [3]),
        ("4, 0-1", [0, 1, 4]),
    ],
)
def test_layers(text, want):
    assert parse_layers(text, 5) == want


@pytest.mark.parametrize("text", ["5", "3-1", "1-5", "-1", "top", "", "1,,2"])
def test_layers_the_model_does_not_have(text):
    with pytest.raises(CommandError, match="--train-layers: expected"):
        parse_layers(text, 5)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (("2-3",), {"layers matrices"}),
        (("2-3", True), {"layers matrices", "embeddings"}),
        (("2-3", False, True), {"layers matrices", "layers norms", "final norm"}),
        (("none", False, True), {"final norm"}),
    ],
)
def test_what_is_trained(arguments, want):
    model = llama(300)
    found = set()
    text = choose_trained(model, *arguments)
    for name, p in model.named_parameters():
        if "layers" in name:
            kind = "layers matrices" if p.dim() > 1 else "layers norms"
            assert p.requires_grad == (kind in want and name.split(".")[2] in "23"), name
            found |= {kind} if p.requires_grad else set()
        elif p.requires_grad:
            found.add("embeddings" if p.dim() > 1 else "final norm")
    assert found == want
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,} of {sum(p.numel() for p in model.parameters()):,}" in text


def test_nothing_left_to_train():
    with pytest.raises(CommandError, match="nothing is left to train"):
        choose_trained(llama(300), "none")
    with pytest.raises(CommandError, match="no list of layers"):
        choose_trained(torch.nn.Linear(2, 2))
