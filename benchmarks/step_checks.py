"""What must hold before a step is timed."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from step_models import LABEL_WORDS, Tokens, build, make_batch
from torch import Tensor, nn

from subzero import SubZero, label_words

SIZE = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
SMALL = {
    "OPT": tf.OPTConfig(**SIZE, ffn_dim=128, word_embed_proj_dim=64),
    "Llama": tf.LlamaConfig(**SIZE, intermediate_size=96, num_key_value_heads=2),
}
# Losses of about 0.7 in fp32 have a rounding of 6e-8; rho is their difference over 2 eps.
TOLERANCE = 1e-3


def check_small_models(device: str) -> None:
    """rho in fp32, by the side path and in place, sign by sign and in one batch.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    for name, config in SMALL.items():
        found = {how: _rho(config, device, how) for how in ("together", "apart", "in place")}
        expected = found["apart"]
        for how, rho in found.items():
            assert abs(rho - expected) <= TOLERANCE * abs(expected), f"{name} {how}: {found}"
        print(f"small {name}, fp32: rho", ", ".join(f"{how} {r:.6f}" for how, r in found.items()))


def _rho(config: Any, device: str, how: str) -> float:
    model = build(config, device, torch.float32)
    batch = make_batch(Tokens(3, 8), SIZE["vocab_size"], device, padded=True)
    objective = label_words(LABEL_WORDS)
    eps = 1e-1  # random models are near linear: a wide difference drowns the rounding
    apply = "in_place" if how == "in place" else "forward"
    opt = SubZero(model, lr=1.0, eps=eps, rank=8, apply=apply)
    if how == "together":
        # the cores move by -rho mu Z: how far, against a step of known rho
        start = [value.clone() for value in values_of(opt)]
        opt.step(batch, objective)
        moved = values_of(opt)[0] - start[0]
        restart(opt, start, 0)
        losses = _apart(opt, batch, objective)
        known = values_of(opt)[0] - start[0]
        rho = (losses[0] - losses[1]) / (2 * eps)
        return float(rho * (moved @ known) / (known @ known))
    losses = _apart(opt, batch, objective)
    return float((losses[0] - losses[1]) / (2 * eps))


def _apart(opt: SubZero, batch: Any, objective: Any) -> list[Tensor]:
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(objective(opt.model, batch).mean().double())
        return losses[-1]

    opt.step(closure)
    return losses


def values_of(opt: SubZero) -> list[Tensor]:
    """What a step changes: all cores, flat, and the masters of norms and biases."""
    return [space.value for _, space in opt._weights.spaces()]


def restart(opt: SubZero, start: list[Tensor], draws: int) -> None:
    """The next step starts from these values and this draw."""
    for value, held in zip(values_of(opt), start, strict=True):
        value.copy_(held)
    opt.draws = draws


def checksum(model: nn.Module) -> int:
    """Of the bits of all parameters, each weighted by its place."""
    total = 0
    for i, p in enumerate(model.parameters()):
        bits = p.detach().view(torch.int16 if p.element_size() == 2 else torch.int32)
        total += (i + 1) * int(bits.sum(dtype=torch.int64))
    return total


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
