"""The native CUDA backend: the ops that have kernels in csrc/cuda, on the tensor's own stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native_args as args

OPS = frozenset({"philox4x32", "normal_"})


def available() -> tuple[bool, str]:
    """Whether the CUDA kernels were built and a GPU is there, and for which architectures."""
    if args.native is None:
        return False, args.why_missing
    if not hasattr(args.native, "cuda"):
        return False, (
            "the native module was built without CUDA: install the CUDA toolkit and rebuild with "
            "`SUBZERO_BUILD_CUDA=1 pip install .`"
        )
    if not torch.cuda.is_available():
        return False, "PyTorch finds no NVIDIA GPU"
    info = args.native.build_info()
    return True, f"native kernels for {info['cuda_architectures']}, by {info['cuda_compiler']}"


def _launch(tensor: Tensor) -> Any:
    stream = torch.cuda.current_stream(tensor.device)
    return args.require().cuda.Launch(device=tensor.device.index, stream=stream.cuda_stream)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    words = torch.empty_like(counter)
    args.require().cuda.philox4x32(
        counter=counter.data_ptr(),
        key=key.data_ptr(),
        words=words.data_ptr(),
        count=counter.shape[0],
        launch=_launch(counter),
    )
    return words


def normal_(out: Tensor, rng: Tensor, stream: int) -> None:
    args.require().cuda.normal_(
        out=args.matrix(out), rng=rng.data_ptr(), stream=stream, launch=_launch(out)
    )
