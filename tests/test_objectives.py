"""LogitsLoss and batches: each loss against one plain unpadded forward per example, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build
from tiny_task import llama, sentences, tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from subzero.batches import Encoder, TrainBatches
from subzero.objectives import LogitsLoss, label_words, next_token
from subzero.tasks import Example, make_task, word_ids

TASK = make_task("movie-reviews")


def gpt2(vocab):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def opt(vocab):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module", params=[llama, gpt2, opt])
def model(request, tok):
    return request.param(len(tok)).double().requires_grad_(False)


@pytest.fixture
def examples():
    return [Example(f"{text} It was", label) for text, label in sentences()[::11]]


@pytest.fixture
def words(tok):
    return word_ids(TASK, tok)


def batch_of(model, tok, examples, side="left"):
    """The encoder's batch, padded on the left, or the same padded on the right."""
    encoder = Encoder(tok, model)
    batch = encoder.collate(encoder.encode(examples), [e.label for e in examples])
    assert 0 < batch["attention_mask"].float().mean() < 1
    return batch if side == "left" else flipped(batch)


def flipped(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = [torch.cat([i[m == 1], i[m == 0]]) for i, m in zip(ids, mask, strict=True)]
    right = {**batch, "input_ids": torch.stack(rows), "attention_mask": mask.flip(1)}
    right.pop("position_ids", None)
    return right


def alone(model, tok, example):
    """Logits (tokens, vocabulary) of one example without padding, mask or position ids."""
    ids = torch.tensor([tok(example.prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return ids[0], model(input_ids=ids, use_cache=False).logits[0]


def head_outputs(model):
    """Shapes of what the head forms from now on."""
    shapes = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: shapes.append(tuple(out.shape))
    )
    return shapes


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_words_are_the_losses_of_each_example_alone(model, tok, examples, words, side):
    batch = batch_of(model, tok, examples, side)
    objective = label_words(words)
    with torch.no_grad():
        losses, logits = objective(model, batch), objective.logits(model, batch)
    assert losses.dtype == torch.float64 and losses.shape == (len(examples),)
    assert logits.shape == (len(examples), 1, len(words))
    assert objective.scored(batch).sum(1).tolist() == [1] * len(examples)
    for loss, row, example in zip(losses, logits[:, 0], examples, strict=True):
        want = alone(model, tok, example)[1][-1, words]
        assert torch.allclose(row, want, rtol=0, atol=1e-9)
        assert abs(loss + want.log_softmax(0)[example.label]) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_next_token_losses_are_those_of_each_example_alone(model, tok, examples, side):
    batch = batch_of(model, tok, examples, side)
    objective = next_token()
    with torch.no_grad():
        losses = objective(model, batch)
    lengths = batch["attention_mask"].sum(1) - 1
    assert losses.shape == (len(examples), int(lengths.max()))
    assert torch.equal(objective.scored(batch).sum(1), lengths)
    for row, length, example in zip(losses, lengths, examples, strict=True):
        ids, logits = alone(model, tok, example)
        want = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        assert torch.allclose(row[:length], want, rtol=0, atol=1e-9)
        assert not row[length:].any()


def test_losses_of_16_bit_models_are_formed_in_fp32(tok, examples, words):
    model = llama(len(tok)).bfloat16()
    batch = batch_of(model, tok, examples)
    for objective in (label_words(words), next_token()):
        assert objective(model, batch).dtype == torch.float32


def test_token_labels_choose_what_is_scored(tok, examples):
    """-100 is not scored; any other label is, whatever token stands there."""
    model = llama(len(tok)).double()
    batch = batch_of(model, tok, examples)
    generator = torch.Generator().manual_seed(0)
    labels = torch.where(
        torch.rand(batch["input_ids"].shape, generator=generator) < 0.6,
        torch.randint(len(tok), batch["input_ids"].shape, generator=generator),
        -100,
    )
    labels[batch["attention_mask"] == 0] = -100
    labels[3] = -100  # an example without any
    batch = {**batch, "labels": labels}
    with torch.no_grad():
        losses = next_token()(model, batch)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    want = want.view(len(examples), -1)
    for row, full, label in zip(losses, want, labels[:, 1:], strict=True):
        # the label in front of which padding stands has no real token that predicts it
        scored = full[label != -100]
        assert torch.allclose(row[row != 0], scored[-int((row != 0).sum()) :], rtol=0, atol=1e-9)
    predicted = (labels[:, 1:] != -100) & (batch["attention_mask"][:, :-1] == 1)
    assert torch.equal((losses != 0).sum(1), predicted.sum(1))


def test_packed_sequences_do_not_predict_each_other(tok):
    """Position ids that start again: the last token of a sequence has no successor."""
    ids = torch.randint(2, len(tok), (2, 9))
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 2)}
    assert next_token().scored(batch)[0].tolist() == [True] * 3 + [False, True, True, False] + [
        True, False,
    ]  # fmt: skip
    model = llama(len(tok)).double()
    with torch.no_grad():
        losses = next_token()(model, batch)
        apart = [model(input_ids=part).logits for part in ids.split([4, 3, 2], 1)]
    want = [
        F.cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none")
        for logits, part in zip(apart, ids.split([4, 3, 2], 1), strict=True)
    ]
    assert torch.allclose(losses, torch.cat(want, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_only_what_is_read_goes_through_the_head(tok, examples, words, trained, tied):
    """One row an example, and of the head only the words, whether it is trained or not."""
    model = llama(len(tok), tie_word_embeddings=tied).double().requires_grad_(False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(1.5)
    head.weight.requires_grad_(trained)
    batch = batch_of(model, tok, examples)
    want = torch.stack([alone(model, tok, e)[1][-1, words] for e in examples])
    shapes = head_outputs(model)
    logits = label_words(words).logits(model, batch)
    assert shapes == [(len(examples), 1, len(words))]
    assert torch.allclose(logits[:, 0], want, rtol=0, atol=1e-9)
    if trained:
        label_words(words)(model, batch).sum().backward()
        assert head.weight.grad[words].any()


def test_next_token_forms_no_row_that_is_not_read(tok, examples):
    model = llama(len(tok))
    batch = batch_of(model, tok, examples)
    shapes = head_outputs(model)
    next_token()(model, batch)
    rows = batch["input_ids"].shape[1] - 1
    assert shapes == [(len(examples), 0, len(tok)), (len(examples), rows, len(tok))]


class WithBias(nn.Module):
    """A plain module, neither of transformers nor with a head it names; returns a tensor."""

    def __init__(self, vocab):
        super().__init__()
        self.embed = nn.Embedding(vocab, 8)
        self.out = nn.Linear(8, vocab)

    def forward(self, input_ids):
        return self.out(self.embed(input_ids))


def test_a_model_without_a_known_head_and_a_head_with_a_bias():
    model = WithBias(20).double()
    ids = torch.randint(20, (3, 5))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 0])}
    want = model(ids)[:, -1, [4, 9]]
    assert torch.equal(label_words([4, 9]).logits(model, batch)[:, 0], want)
    model.get_output_embeddings = lambda: model.out
    model.requires_grad_(False)
    model.forward_tensor, model.forward = (
        model.forward,
        lambda input_ids: Output(WithBias.forward(model, input_ids)),
    )
    assert torch.allclose(label_words([4, 9]).logits(model, batch)[:, 0], want, atol=1e-12)


class Output:
    def __init__(self, logits):
        self.logits = logits


def test_encoder_decoder_with_labels():
    """Labels become the decoder's input; each is scored where the decoder predicts it."""
    model = build("t5").double()
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(2, 96, (3, 7), generator=generator)
    labels = torch.randint(2, 96, (3, 5), generator=generator)
    labels[1, 3:] = -100
    with torch.no_grad():
        losses = next_token()(model, {"input_ids": source, "labels": labels})
        logits = model(input_ids=source, labels=labels).logits
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    assert torch.allclose(losses, want, rtol=0, atol=1e-9) and not losses[1, 3:].any()


def test_positions_of_any_kind(tok, examples):
    """A mask, a function of the batch, or what the call is given; entries beyond count nothing."""
    model = llama(len(tok)).double()
    batch = batch_of(model, tok, examples)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[:, -1] = True
    mask[0, -3:] = True

    def margin(logits, _):
        return logits[..., 7] - logits[..., 3]

    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        every = margin(logits, None)
        for losses in (
            LogitsLoss(margin, mask)(model, batch),
            LogitsLoss(margin, lambda b: mask)(model, batch),
            LogitsLoss(margin)(model, batch, mask),
        ):
            assert losses.shape == (len(examples), 3)
            assert torch.allclose(losses[0], every[0, -3:], rtol=0, atol=1e-9)
            assert torch.allclose(losses[1:, 0], every[1:, -1], rtol=0, atol=1e-9)
            assert not losses[1:, 1:].any()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_next_token_follows_the_positions_of_a_call(tok, examples, side, labelled):
    """Of the tokens in a mask those that have something to predict."""
    model = llama(len(tok)).double()
    batch = batch_of(model, tok, examples, side)
    real = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(real.shape, generator=generator) < 0.5
    mask[0], mask[1] = False, True
    if labelled:
        labels = torch.where(torch.rand(real.shape, generator=generator) < 0.6, 3, -100)
        batch = {**batch, "labels": labels}
    targets = F.pad((labels if labelled else batch["input_ids"])[:, 1:], (0, 1), value=-100)
    aim = targets != -100 if labelled else F.pad((real[:, 1:] & real[:, :-1]), (0, 1))
    objective = next_token()
    scored = objective.scored(batch, mask)
    assert torch.equal(scored, mask & aim & real) and scored.any() and not scored[0].any()
    with torch.no_grad():
        losses = objective(model, batch, mask)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    every = F.cross_entropy(logits.transpose(1, 2), targets.clamp(min=0), reduction="none")
    for row, full, chosen in zip(losses, every, scored, strict=True):
        count = int(chosen.sum())
        assert torch.allclose(row[:count], full[chosen], rtol=0, atol=1e-9)
        assert not row[count:].any()
    with torch.no_grad():  # fn itself reads what the batch names
        own = objective.fn(objective.logits(model, batch), batch)
        whole = objective(model, batch)
    assert torch.equal(own.masked_fill(whole == 0, 0), whole)
    with pytest.raises(ValueError, match="positions: .*a real successor"):
        objective(model, batch, ~aim)


def test_next_token_of_decoder_inputs():
    """Without labels: the decoder's own tokens, not the source's."""
    model = build("t5").double()
    source, ids = torch.arange(2, 16).view(2, 7), torch.arange(20, 30).view(2, 5)
    with torch.no_grad():
        losses = next_token()(model, {"input_ids": source, "decoder_input_ids": ids})
        logits = model(input_ids=source, decoder_input_ids=ids).logits[:, :-1]
    want = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(losses, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("own", [False, True])
def test_the_model_is_left_as_it_was(tok, examples, words, own):
    model = llama(len(tok))
    head = model.get_output_embeddings()
    mine = lambda hidden: nn.Linear.forward(head, hidden)  # noqa: E731
    if own:
        head.forward = mine
    batch = batch_of(model, tok, examples)
    before = dict(head.__dict__)
    label_words(words)(model, batch)
    assert head.__dict__ == before

    def fails(*_):
        raise KeyboardInterrupt

    handle = head.register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        label_words(words)(model, batch)
    handle.remove()
    assert head.__dict__.get("forward") is (mine if own else None)
    assert not model.training and model.config.use_cache


def test_errors(tok, examples):
    model = llama(len(tok))
    batch = batch_of(model, tok, examples)
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(TypeError, match="fn: expected a callable"):
        LogitsLoss("sum")
    with pytest.raises(TypeError, match="batch: expected a mapping of tensors"):
        label_words([1, 2])(model, batch["input_ids"])
    loss = LogitsLoss(lambda logits, batch: logits.sum((1, 2)))
    with pytest.raises(ValueError, match="positions: expected a mask or labels of the tokens"):
        loss(model, plain)
    with pytest.raises(ValueError, match=r"positions: expected a mask of shape \(12, "):
        loss(model, plain, torch.ones(12, 2))
    with pytest.raises(ValueError, match="at least one real token"):
        loss(model, plain, torch.zeros_like(batch["input_ids"]))
    source = {"input_ids": batch["input_ids"] % 96, "labels": batch["labels"]}
    with pytest.raises(
        ValueError, match=r"labels: expected \(examples, tokens\).*got shape \(12,\)"
    ):
        next_token()(build("t5"), source)
    with pytest.raises(ValueError, match="expected decoder_input_ids or labels"):
        next_token()(build("t5"), {"input_ids": batch["input_ids"] % 96})


def test_special_tokens_stay_in_front_and_long_prompts_keep_their_end():
    tok = tokenizer(bos=True)
    encoder = Encoder(tok, llama(len(tok)), max_tokens=5)
    (ids,) = encoder.encode([Example("the film is very good It was")])
    assert len(ids) == 5 and ids[0] == tok.bos_token_id and tok.eos_token_id not in ids
    assert tok.decode(ids[1:]).endswith("It was")


def test_evaluation_batches_cover_every_example_once_within_the_budget(tok):
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    encoder = Encoder(tok, llama(len(tok)))
    seen = []
    for rows, batch in encoder.sorted_batches(examples, tokens=100):
        seen += rows
        assert batch["input_ids"].numel() <= 100
        assert batch["labels"].tolist() == [examples[i].label for i in rows]
    assert sorted(seen) == list(range(len(examples)))


def test_training_batches_are_drawn_by_seed_once_an_epoch(tok):
    examples = [Example(f"{text} It was", label) for text, label in sentences()]
    encoder = Encoder(tok, llama(len(tok)))

    def epochs(seed):
        stream = iter(TrainBatches(encoder, examples, 16, seed))
        return [next(stream)["input_ids"] for _ in range(16)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    texts = [tok.decode(row, skip_special_tokens=True) for batch in first[:8] for row in batch]
    assert sorted(texts) == sorted(e.prompt for e in examples)
