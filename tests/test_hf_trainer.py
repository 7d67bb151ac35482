"""SubZeroTrainer on tiny models, with Trainer's own loop and `datasets` objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from subzero import SubZero, SubZeroConfig, SubZeroTrainer, next_token

Dataset = pytest.importorskip("datasets", reason="the data of these tests").Dataset

SIZE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def causal() -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **SIZE, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, use_cache=False
        )
    ).eval()


def classifier() -> Any:
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(**SIZE, intermediate_size=48, max_position_embeddings=64, num_labels=2)
    ).eval()


def seq2seq() -> Any:
    torch.manual_seed(0)
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    ).eval()  # fmt: skip


def rows(kind: str, count: int = 16) -> Dataset:
    """Token rows; the class of a row is the parity of its first token."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 96, (count, 8), generator=g)
    labels = ids[:, 0] % 2 if kind == "classifier" else ids
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


MODELS = {"causal": causal, "classifier": classifier, "seq2seq": seq2seq}


def config(folder: Path, **changes: Any) -> SubZeroConfig:
    base: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-4,
        rank=4, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, refresh_every=3,
    )  # fmt: skip
    return SubZeroConfig(**(base | changes))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", MODELS)
def test_batched_losses_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """All signs in one forward, and one sign at a time through compute_loss: the same losses."""

    class Own(SubZeroTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    logs = []
    for cls in (SubZeroTrainer, Own):
        trainer = cls(MODELS[kind](), config(tmp_path, gradient_accumulation_steps=2),
                      train_dataset=rows(kind))  # fmt: skip
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 4
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_is_the_optimizer_on_the_same_batches(tmp_path: Path) -> None:
    """Trainer's loop adds nothing to the steps: bit for bit those of a plain loop."""
    data = rows("causal")
    trainer = SubZeroTrainer(
        causal(),
        config(tmp_path, train_sampling_strategy="sequential", gradient_accumulation_steps=2),
        train_dataset=data,
    )
    trainer.train()
    model = causal()
    opt = SubZero(model, lr=1e-4, rank=4, refresh_every=3, seed=42)
    ids = torch.tensor(data["input_ids"])
    for step in range(4):
        half = ids[8 * (step % 2) :][:8]
        opt.step([{"input_ids": x, "labels": x} for x in half.split(4)], next_token())
    assert same(weights(trainer.model), weights(model))


@pytest.mark.parametrize("changes", [{}, {"rule": "adam"}, {"lr_scheduler_type": "linear"}])
def test_resumes_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    how = dict(max_steps=6, save_strategy="steps", save_steps=2, **changes)
    whole = SubZeroTrainer(causal(), config(tmp_path, **how), train_dataset=rows("causal"))
    whole.train()
    saved = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert "subzero.safetensors" in saved and "optimizer.pt" not in saved
    again = SubZeroTrainer(causal(), config(tmp_path, **how), train_dataset=rows("causal"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(whole.model), weights(again.model))
    assert whole.lr_scheduler.get_last_lr() == again.lr_scheduler.get_last_lr()


def test_saved_weights_give_the_same_logits_in_plain_transformers(tmp_path: Path) -> None:
    trainer = SubZeroTrainer(causal(), config(tmp_path), train_dataset=rows("causal"))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = torch.tensor(rows("causal")["input_ids"])
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(ids).logits, plain(ids).logits)
        assert not torch.equal(causal()(ids).logits, plain(ids).logits)


def test_best_model_early_stopping_and_metrics(tmp_path: Path) -> None:
    def accuracy(out: Any) -> dict[str, float]:
        return {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())}

    trainer = SubZeroTrainer(
        classifier(),
        config(
            tmp_path, max_steps=20, learning_rate=0.5, eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, load_best_model_at_end=True, save_total_limit=1,
        ),
        train_dataset=rows("classifier"),
        eval_dataset=rows("classifier"),
        compute_metrics=accuracy,
        callbacks=[tf.EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(losses) < 20, "early stopping"
    scores = trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert 0 <= scores["eval_accuracy"] <= 1


def test_a_score_through_generate(tmp_path: Path) -> None:
    """A number that no gradient reaches: what share of the generated tokens is even."""

    def even(model: Any, inputs: Any) -> float:
        new = model.generate(input_ids=inputs["input_ids"], max_new_tokens=2, do_sample=False)
        return float((new[:, -2:] % 2 == 0).float().mean())

    trainer = SubZeroTrainer(
        causal(), config(tmp_path, eps=0.5), train_dataset=rows("causal"), score=even
    )
    before = weights(trainer.model)
    trainer.train()
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert all(-1 <= loss <= 0 for loss in logged)
    assert not same(before, weights(trainer.model))


@pytest.mark.parametrize("noise", ["weight", "activation"])
@pytest.mark.parametrize("kind", MODELS)
def test_noise_and_bf16(kind: str, noise: str, tmp_path: Path) -> None:
    trainer = SubZeroTrainer(
        MODELS[kind](),
        config(tmp_path, noise=noise, bf16=True, eps=1e-2, max_steps=2),
        train_dataset=rows(kind),
    )
    before = weights(trainer.model)
    trainer.train()
    assert not same(before, weights(trainer.model))
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
def test_peft(scheme: str, tmp_path: Path) -> None:
    """Adapters train, the model under them does not, and what is saved loads in peft."""
    import peft

    how: Any = {
        "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[scheme]
    base = causal()
    if scheme == "prefix":
        base.config.use_cache = True
    model = peft.get_peft_model(base, how)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = SubZeroTrainer(model, config(tmp_path, learning_rate=1e-2), train_dataset=rows("c"))
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= trained
    trainer.save_model(str(tmp_path / "adapter"))
    plain = peft.PeftModel.from_pretrained(causal(), tmp_path / "adapter").eval()
    ids = torch.tensor(rows("causal")["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_grad_norm: expected 0"):
        config(tmp_path, max_grad_norm=1.0)
    with pytest.raises(TypeError, match="args: expected a SubZeroConfig"):
        SubZeroTrainer(causal(), tf.TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(ValueError, match="score: expected noise='weight'"):
        SubZeroTrainer(causal(), config(tmp_path, noise="activation"), score=lambda m, i: 0.0)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected subzero.safetensors"):
        trainer = SubZeroTrainer(causal(), config(tmp_path), train_dataset=rows("causal"))
        trainer.save_model(str(tmp_path / "checkpoint-1"))
        trainer.state.train_batch_size = 4
        trainer.state.save_to_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["weight", "activation"])
@pytest.mark.parametrize("kind", MODELS)
def test_captured_steps_are_the_eager_ones(kind: str, noise: str, tmp_path: Path) -> None:
    """Without the user asking: one graph for the one shape, and the same weights bit for bit."""
    runs = []
    for capture in (True, False):
        trainer = SubZeroTrainer(
            MODELS[kind](),
            config(tmp_path, use_cpu=False, noise=noise, eps=1e-2, max_steps=6, capture=capture),
            train_dataset=rows(kind),
        )
        trainer.train()
        assert len(trainer._captured) == int(capture)
        runs.append(weights(trainer.model))
    assert same(*runs)
