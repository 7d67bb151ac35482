"""The shapes of whole models, and as many of their layers as the memory holds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

Shape = tuple[int, ...]

# Left free beside a model's weights, for bases, temporaries of eager lines and CUDA graphs.
ROOM = 8 << 30


class Model(NamedTuple):
    """The shapes of all parameters that fine-tuning trains."""

    layers: int
    of_layer: list[Shape]
    others: list[Shape]

    @property
    def tensors(self) -> list[Shape]:
        return self.others + self.layers * self.of_layer

    @property
    def matrices(self) -> list[Shape]:
        return [shape for shape in self.tensors if len(shape) == 2]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.tensors))


def _opt(layers: int, width: int) -> Model:
    inner = 4 * width
    layer: list[Shape] = [*4 * [(width, width)], (inner, width), (width, inner)]
    layer += [*4 * [(width,)], (inner,), (width,), *4 * [(width,)]]  # biases, then norms
    return Model(layers, layer, [(50272, width), (2050, width), (width,), (width,)])


def _llama3_8b() -> Model:
    layer: list[Shape] = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    layer += [(14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,)]
    return Model(32, layer, [(128256, 4096), (128256, 4096), (4096,)])


MODELS = {
    "OPT-13B": _opt(40, 5120),
    "OPT-1.3B": _opt(24, 2048),
    "Llama-3-8B": _llama3_8b(),
}
RANKS = {"OPT-13B": 64, "OPT-1.3B": 24, "Llama-3-8B": 64}


def opt_13b_lora(rank: int = 8) -> list[Shape]:
    """The LoRA tensors on q and v of OPT-13B: A (r, n) and B (m, r)."""
    return 80 * [(rank, 5120), (5120, rank)]


def memory_for_weights(device: str) -> int | None:
    """Bytes that a benchmark's weights may take on a GPU; None elsewhere, where models are tiny."""
    if not device.startswith("cuda"):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - ROOM


def fitted(name: str, model: Model, element_bytes: int, memory: int | None) -> tuple[str, Model]:
    """The model, cut to the layers that fit into ``memory`` bytes, and what to call it.

    Raises:
        ValueError: not even one layer fits.
    """
    if memory is None or model.numel * element_bytes <= memory:
        return name, model
    layer = sum(map(math.prod, model.of_layer)) * element_bytes
    others = sum(map(math.prod, model.others)) * element_bytes
    layers = (memory - others) // layer
    if layers < 1:
        raise ValueError(
            f"{name}: expected {others + layer} bytes for one layer and its embeddings, got "
            f"{memory}; leave this model out"
        )
    return f"{name}, {layers} of {model.layers} layers", model._replace(layers=layers)


def whole(what: str) -> str:
    """The model's name, whether or not it was cut: a target holds for a share of a model too."""
    return what.partition(",")[0]
