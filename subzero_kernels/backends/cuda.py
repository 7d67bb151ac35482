"""The native CUDA backend: kernels of csrc/cuda on the tensor's own stream.

``lowrank_linear`` is one on Hopper for 16-bit weights, elsewhere a composition of torch's GEMMs
(_gemms.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _gemms, reference
from . import _high_rank as high_rank
from . import _native_args as args
from .reference import _exact_products

OPS = frozenset(
    {
        "philox4x32",
        "normal_",
        "perturb_",
        "perturb_many_",
        "perturb_dense_",
        "core_noise_",
        "fold_",
        "add_noise_",
        "noise_outer_",
        "lowrank_linear",
        "lowrank_embedding",
        "grouped_norm",
    }
)

# The widest `a` that noise_outer_'s kernel takes. For others the noise is made this many elements
# at a time, 16 MiB, but no more than `out` has.
_FUSED_WIDTH = 128
_NOISE_ELEMENTS = 1 << 22
# The highest rank that lowrank_embedding's kernel takes.
_EMBEDDING_RANK = 128
# lowrank_linear's kernel: the highest rank, and the rows of x from which on it is the faster one.
_LINEAR_RANK = 256
_LINEAR_ROWS = 256


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


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


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


class PerturbPlan:
    """perturb_many_ on one list of matrices, sorted into launches once.

    Whoever makes it keeps the memory alive; it holds tensors only where ranks are high.
    """

    def __init__(
        self,
        ws: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        streams: Sequence[int],
        op: str = "perturb_many_",
    ) -> None:
        items = list(zip(ws, us, vs, streams, strict=True))
        native = [item for item in items if item[1].shape[1] <= high_rank.NATIVE_RANK]
        self._high_rank = [item for item in items if item[1].shape[1] > high_rank.NATIVE_RANK]
        self.holds_tensors = bool(self._high_rank)
        self._device = ws[0].device
        self._plan = args.require().cuda.LowRankPlan(
            op=op, items=[args.low_rank(*item) for item in native], device=self._device.index
        )

    def perturb_(self, coeff: Tensor, rng: Tensor, rounding: str = "nearest") -> None:
        queries = coeff.shape[0]
        scratch = _scratch(self._plan.scratch_bytes(queries), self._device)
        self._plan.perturb_(
            coeff=coeff.data_ptr(),
            queries=queries,
            rng=rng.data_ptr(),
            rounding=args.rounding(rounding),
            scratch=scratch.data_ptr(),
            stream=torch.cuda.current_stream(self._device).cuda_stream,
        )
        for w, u, v, stream in self._high_rank:
            high_rank.perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)


perturb_plan = PerturbPlan


def perturb_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    coeff: Tensor,
    rng: Tensor,
    *,
    stream: int,
    rounding: str = "nearest",
) -> None:
    PerturbPlan([w], [u], [v], [stream], "perturb_").perturb_(coeff, rng, rounding)


def prepare_perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Callable[[Tensor, Tensor], None] | None:
    plan = PerturbPlan(ws, us, vs, streams)
    return None if plan.holds_tensors else functools.partial(plan.perturb_, rounding=rounding)


def perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    PerturbPlan(ws, us, vs, streams).perturb_(coeff, rng, rounding)


def fold_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    *,
    decay: float = 1.0,
    rounding: str = "nearest",
    rng: Tensor | None = None,
    stream: int = 0,
) -> None:
    if u.shape[1] > high_rank.NATIVE_RANK:
        high_rank.fold_(w, u, v, core, decay=decay, rounding=rounding, rng=rng, stream=stream)
        return
    plan = args.require().cuda.LowRankPlan(
        op="fold_", items=[args.low_rank(w, u, v, stream)], device=w.device.index
    )
    scratch = _scratch(plan.scratch_bytes(0), w.device)  # has to outlive the launch
    plan.fold_(
        core=core.data_ptr(),
        decay=decay,
        rounding=args.rounding(rounding),
        rng=0 if rng is None else rng.data_ptr(),
        scratch=scratch.data_ptr(),
        stream=torch.cuda.current_stream(w.device).cuda_stream,
    )


def prepare_perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Callable[[Tensor, Tensor], None]:
    items, how = args.dense(ws, streams), args.rounding(rounding)

    def run(coeff: Tensor, rng: Tensor) -> None:
        args.require().cuda.perturb_dense_(
            items=items,
            queries=args.queries(coeff, rng),
            rounding=how,
            launch=_launch(coeff),
        )

    return run


def perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    prepare_perturb_dense_(ws, coeff, rng, streams=streams, rounding=rounding)(coeff, rng)


def prepare_core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> Callable[[Tensor, Tensor], None]:
    items = args.cores(out, base, streams, mu)

    def run(coeff: Tensor, rng: Tensor) -> None:
        args.require().cuda.core_noise_(
            items=items,
            groups=coeff.shape[0],
            queries=args.queries(coeff, rng),
            launch=_launch(coeff),
        )

    return run


def core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> None:
    prepare_core_noise_(out, base, coeff, rng, streams=streams, mu=mu)(coeff, rng)


def add_noise_(
    y: Tensor, scale: Tensor, query: Tensor, rows: Tensor, rng: Tensor, *, stream: int
) -> None:
    args.require().cuda.add_noise_(
        args=args.add_noise(y, scale, query, rows, rng, stream), launch=_launch(y)
    )


def noise_outer_(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    rows: Tensor,
    rng: Tensor,
    *,
    stream: int,
    beta: float = 0.0,
) -> None:
    if a.shape[1] > _FUSED_WIDTH:
        _wide_noise_outer_(out, weight, a, rows, rng, stream=stream, beta=beta)
        return
    native = args.require().cuda
    call = args.noise_outer(out, weight, a, rows, rng, stream, beta)
    size = native.noise_outer_scratch_bytes(args=call)
    scratch = torch.empty(size, dtype=torch.uint8, device=out.device) if size else None
    native.noise_outer_(
        args=call, scratch=0 if scratch is None else scratch.data_ptr(), launch=_launch(out)
    )


@_exact_products
def _wide_noise_outer_(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    rows: Tensor,
    rng: Tensor,
    *,
    stream: int,
    beta: float,
) -> None:
    """noise_outer_ with torch's GEMM, which makes the noise of each row once for all of ``a``."""
    native = args.require()
    (queries, count), columns = weight.shape, out.shape[0]
    if not count:
        out.mul_(beta) if beta else out.zero_()
    step = max(1, min(_NOISE_ELEMENTS, out.numel()) // columns)
    buffer = out.new_empty(min(step, count), columns)
    for start in range(0, count, step):
        part = slice(start, start + step)
        noise = buffer[: len(rows[part])]
        native.cuda.noise_outer_sum(
            sum=noise.data_ptr(),
            queries=native.Queries(
                coeff=weight[:, part].data_ptr(), count=queries, rng=rng.data_ptr()
            ),
            weight_stride=count,
            row=rows[part].data_ptr(),
            rows=noise.shape[0],
            columns=columns,
            stream=stream,
            launch=_launch(out),
        )
        out.addmm_(noise.T, a[part].float(), beta=1.0 if start else beta)


@functools.cache
def _has_linear_kernel(device: int) -> bool:
    """Whether this GPU is the one that lowrank_linear's kernel was written and built for."""
    built = args.require().build_info()["cuda_architectures"].split()
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and any(name.startswith("90a") for name in built)


def _tiled(matrix: Tensor) -> bool:
    """Whether TMA can read tiles of it: rows and their distance in pieces of 16 bytes."""
    return (
        matrix.data_ptr() % 16 == 0
        and matrix.shape[1] % 8 == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) % 8 == 0
    )


def _takes_linear_kernel(
    rows: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor
) -> bool:
    return (
        w.dtype != torch.float32
        and u.dtype == v.dtype == w.dtype
        and _LINEAR_ROWS <= rows.shape[0] < 2**31 - 512
        and u.shape[1] <= _LINEAR_RANK
        and min(w.shape) > 0
        and w.shape[0] % 8 == 0
        and (bias is None or bias.stride(-1) == 1)
        and all(map(_tiled, (rows, w, u, v)))
        and _has_linear_kernel(w.device.index)
    )


def lowrank_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not _takes_linear_kernel(rows, w, bias, u, v):
        return _gemms.lowrank_linear(x, w, bias, u, v, core)
    y = torch.empty(*x.shape[:-1], w.shape[0], dtype=x.dtype, device=x.device)
    native = args.require().cuda
    size = native.lowrank_linear_scratch_bytes(
        rows=rows.shape[0], rank=u.shape[1], groups=core.shape[0]
    )
    scratch = _scratch(size, x.device)
    native.lowrank_linear(
        args=args.lowrank_linear(rows, w, bias, u, v, core, scratch, y),
        launch=_launch(w),
    )
    return y


def lowrank_embedding(ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    """An id out of range gives a row of NaN: nothing waits for the device to find it."""
    if core.shape[1] > _EMBEDDING_RANK:
        return reference.lowrank_embedding(ids, w, u, v, core)
    out = torch.empty(*ids.shape, w.shape[1], dtype=w.dtype, device=w.device)
    if out.numel():
        args.require().cuda.lowrank_embedding(
            args=args.lowrank_embedding(ids.contiguous(), w, u, v, core, out), launch=_launch(w)
        )
    return out


def grouped_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    """Triton's kernel where Triton is installed, else torch's norm with what follows it."""
    from . import load

    module: Any = load("triton")[0] or reference
    return module.grouped_norm(x, weight, bias, eps, centred)
