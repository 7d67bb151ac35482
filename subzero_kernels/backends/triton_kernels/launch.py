"""How kernels are launched: on the tensors' device, with the arithmetic of the RNG contract."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import INTERPRETED

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

interpreted = bool(INTERPRETED.value)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; what a test of the interpreter needs is many items, not many programs."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def described(count: int, **first: torch.Tensor) -> str:
    """What a launch on many tensors says of them in an error: of hundreds the first is enough."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in first.items())
    return f"{count} tensors, the first: {shapes}"


def launch(
    op: str,
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    on: str | Sequence[torch.Tensor] = (),
    **options: Any,
) -> None:
    """Run ``kernel``; whatever Triton or the driver says becomes a RuntimeError that names the op
    and the shapes: of ``on`` where given (text where a table hides the tensors), else of ``args``.

    fma is fused where the source says so and nowhere else, or normals would have other bits.
    """
    if not all(grid):
        return
    other = device.type == "cuda" and torch.cuda.current_device() != device.index
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        try:
            kernel[grid](*args, enable_fp_fusion=False, **options)
        except Exception as error:
            if not isinstance(on, str):
                tensors = on or [a for a in args if isinstance(a, torch.Tensor)]
                on = "tensors " + ", ".join(str(tuple(t.shape)) for t in tensors)
            raise RuntimeError(
                f"{op}: Triton {triton.__version__} could not run {kernel.fn.__name__} on {device} "
                f"(grid {grid}, {on}): {error}"
            ) from error
