"""The one validation of the ops, for real and fake calls alike: it reads shapes, never data.

Each ``check_<op>`` takes the op's own arguments, raises ValueError (TypeError for a dtype) with the
argument's name, what was expected, what came and a remedy, and returns the tensor that decides the
backend, or None where there is nothing to do. It runs before anything is written, so bad input
leaves every argument as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import (
    WEIGHT_DTYPES,
    check_coeff,
    check_companion,
    check_contiguous,
    check_core,
    check_cores,
    check_count,
    check_device,
    check_dtype,
    check_factors,
    check_groups,
    check_index,
    check_layout,
    check_memory,
    check_no_grad,
    check_rng,
    check_rounding,
    check_rows,
    check_slabs,
    check_small,
    check_stream,
    check_streams,
    check_weight,
    deciding,
    fail,
    numbered,
    row_strided,
)


def check_philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    for name, tensor in (("counter", counter), ("key", key)):
        check_dtype(name, tensor, [torch.int64])
    if counter.dim() != 2 or counter.shape[1] != 4:
        raise fail("counter", "(N, 4)", tuple(counter.shape), "give four 32-bit words per row")
    if key.dim() != 1 or key.shape[0] != 2:
        raise fail("key", "(2,)", tuple(key.shape), "give the seed's low and high 32 bits")
    check_contiguous("counter", counter)
    check_contiguous("key", key)
    check_device([("counter", counter), ("key", key)])
    return counter


def check_normal_(out: Tensor, rng: Tensor, stream: int) -> Tensor | None:
    tensors = [("out", out), ("rng", rng)]
    check_weight("out", out)
    check_rng(rng)
    check_device(tensors)
    check_no_grad(tensors)
    check_stream("stream", stream)
    check_memory(tensors[:1], tensors[1:])
    return out if out.numel() else None


def check_perturb_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    coeff: Tensor,
    rng: Tensor,
    *,
    stream: int,
    rounding: str = "nearest",
) -> Tensor:
    tensors = [("w", w), ("u", u), ("v", v), ("coeff", coeff), ("rng", rng)]
    check_weight("w", w)
    check_factors(*tensors[:3], reshape=True)
    check_coeff(coeff, w)
    check_rng(rng)
    check_device(tensors)
    check_no_grad(tensors)
    check_stream("stream", stream)
    check_rounding(rounding)
    check_memory(tensors[:1], tensors[1:])
    return w


def check_perturb_plan(
    ws: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], *, streams: Sequence[int]
) -> Tensor | None:
    check_count("us", us, "ws", len(ws))
    check_count("vs", vs, "ws", len(ws))
    written = numbered("ws", ws)
    read = numbered("us", us) + numbered("vs", vs)
    for i in range(len(ws)):
        check_weight(*written[i])
        check_factors(written[i], read[i], read[i + len(ws)], reshape=True)
    check_device(written + read)
    check_no_grad(written + read)
    check_streams(streams, "ws", len(ws))
    check_memory(written, read)
    return deciding(ws)


def check_perturb_plan_call(
    lead: Tensor | None, coeff: Tensor, rng: Tensor, *, rounding: str = "nearest"
) -> None:
    """What a plan cannot know beforehand: the arguments that change from call to call.

    ``lead`` is what :func:`check_perturb_plan` returned; all ws are on its device.
    """
    check_coeff(coeff, lead)
    check_rng(rng)
    read = [("coeff", coeff), ("rng", rng)]
    check_device(read if lead is None else [("ws[0]", lead), *read])
    check_no_grad(read)
    check_rounding(rounding)


def check_perturb_many_(
    ws: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Tensor | None:
    lead = check_perturb_plan(ws, us, vs, streams=streams)
    check_perturb_plan_call(lead, coeff, rng, rounding=rounding)
    check_memory(numbered("ws", ws), [("coeff", coeff), ("rng", rng)])
    return lead


def check_perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> Tensor | None:
    written = numbered("ws", ws)
    for named in written:
        check_weight(*named)
    lead = deciding(ws)
    check_coeff(coeff, lead)
    check_rng(rng)
    read = [("coeff", coeff), ("rng", rng)]
    check_device(written + read)
    check_no_grad(written + read)
    check_streams(streams, "ws", len(ws))
    check_rounding(rounding)
    check_memory(written, read)
    return lead


def check_core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> Tensor | None:
    check_count("base", base, "out", len(out))
    check_count("mu", mu, "out", len(out))
    if coeff.dim() != 2 or coeff.shape[0] < 1 or coeff.shape[1] < 1:
        raise fail(
            "coeff",
            "(G, K), G groups and K queries, both >= 1",
            tuple(coeff.shape),
            "pass coeff[None] for one group",
        )
    check_contiguous("coeff", coeff)
    groups = coeff.shape[0]
    written, read = numbered("out", out), numbered("base", base)
    for (out_name, cores), (base_name, start) in zip(written, read, strict=True):
        check_dtype(base_name, start, [torch.float32, torch.float64])
        check_dtype(out_name, cores, [start.dtype])
        check_small("coeff", coeff, start)
        if start.dim() != 2 or start.shape[0] != start.shape[1] or start.shape[0] < 1:
            raise fail(
                base_name, "(r, r) with r >= 1", tuple(start.shape), "pass the core of one matrix"
            )
        rank = start.shape[0]
        if tuple(cores.shape) != (groups, rank, rank):
            raise fail(
                out_name,
                f"({groups}, {rank}, {rank}) for coeff ({groups}, K) and {base_name} {rank, rank}",
                tuple(cores.shape),
                f"pass torch.empty({groups}, {rank}, {rank})",
            )
        check_contiguous(out_name, cores)
        check_contiguous(base_name, start)
    for i, scale in enumerate(mu):
        if not math.isfinite(scale):
            raise fail(f"mu[{i}]", "a finite number", scale, "pass sqrt(m n) / r")
    check_rng(rng)
    # Only with one group can out[i] be as large as base[i], and so be its very memory.
    same = {(f"out[{i}]", f"base[{i}]") for i in range(len(out))}
    read += [("coeff", coeff), ("rng", rng)]
    check_device(written + read)
    check_no_grad(written + read)
    check_streams(streams, "out", len(out))
    check_memory(written, read, same)
    return deciding(base)


def check_fold_(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    *,
    decay: float = 1.0,
    rounding: str = "nearest",
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    tensors = [("w", w), ("u", u), ("v", v), ("core", core)]
    check_weight("w", w)
    check_factors(*tensors[:3], reshape=True)
    check_core(core, w, u.shape[1])
    if not math.isfinite(decay):
        raise fail("decay", "a finite number", decay, "pass 1.0 for no decay")
    check_rounding(rounding)
    if rng is not None:
        check_rng(rng)
        tensors.append(("rng", rng))
    elif rounding == "stochastic":
        raise fail(
            "rng",
            "[seed, folds so far] for rounding='stochastic'",
            None,
            "pass make_rng(seed, folds)",
        )
    check_stream("stream", stream)
    check_device(tensors)
    check_no_grad(tensors)
    check_memory(tensors[:1], tensors[1:])
    return w


def check_add_noise_(
    y: Tensor, scale: Tensor, query: Tensor, rows: Tensor, rng: Tensor, *, stream: int
) -> Tensor | None:
    written = [("y", y)]
    read = [("scale", scale), ("query", query), ("rows", rows), ("rng", rng)]
    check_dtype("y", y, WEIGHT_DTYPES)
    if y.dim() != 3:
        raise fail("y", "(G, N, c)", tuple(y.shape), "pass y[None] for one group")
    check_slabs("y", y)
    groups, count, _ = y.shape
    check_small("scale", scale, y)
    if tuple(scale.shape) != (groups, count):
        raise fail(
            "scale",
            f"({groups}, {count}) for y {tuple(y.shape)}",
            tuple(scale.shape),
            "pass one number for each row of each group",
        )
    check_contiguous("scale", scale)
    check_index("query", query, groups, "group of y")
    check_index("rows", rows, count, "row of y")
    check_rng(rng)
    check_device(written + read)
    check_no_grad(written + read)
    check_stream("stream", stream)
    check_memory(written, read)
    return y if y.numel() else None


def check_noise_outer_(
    out: Tensor,
    weight: Tensor,
    a: Tensor,
    rows: Tensor,
    rng: Tensor,
    *,
    stream: int,
    beta: float = 0.0,
) -> Tensor | None:
    written = [("out", out)]
    read = [("weight", weight), ("a", a), ("rows", rows), ("rng", rng)]
    check_dtype("out", out, [torch.float32, torch.float64])
    if out.dim() != 2:
        raise fail("out", "(c, r)", tuple(out.shape), "pass a matrix")
    check_rows("out", out)
    check_small("weight", weight, out)
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise fail(
            "weight",
            "(K, N), K queries, K >= 1",
            tuple(weight.shape),
            "pass weight[None] for one query",
        )
    check_contiguous("weight", weight)
    count, width = weight.shape[1], out.shape[1]
    check_dtype("a", a, WEIGHT_DTYPES[: 4 if out.dtype is torch.float64 else 3])
    if tuple(a.shape) != (count, width):
        raise fail(
            "a",
            f"({count}, {width}) for weight {tuple(weight.shape)} and out {tuple(out.shape)}",
            tuple(a.shape),
            "pass one row for each column of weight",
        )
    check_rows("a", a)
    check_index("rows", rows, count, "row of a")
    if not math.isfinite(beta):
        raise fail("beta", "a finite number", beta, "pass 0.0 to overwrite out")
    check_rng(rng)
    check_device(written + read)
    check_no_grad(written + read)
    check_stream("stream", stream)
    check_memory(written, read)
    return out if out.numel() else None


def check_lowrank_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    tensors = [("w", w), ("x", x), ("u", u), ("v", v), ("core", core)]
    check_dtype("w", w, WEIGHT_DTYPES)
    if w.dim() != 2:
        raise fail("w", "(m, n)", tuple(w.shape), "pass the weight of a linear layer")
    check_layout("w", w if row_strided(w) else w.T)
    check_factors(tensors[0], *tensors[2:4], reshape=False)
    check_cores(core, w, u.shape[1])
    check_dtype("x", x, [w.dtype])
    groups, (rows, columns) = core.shape[0], w.shape
    if x.dim() < 1 or x.shape[-1] != columns or (groups > 1 and x.dim() < 2):
        raise fail(
            "x",
            f"(rows, ..., {columns}) for w {tuple(w.shape)}",
            tuple(x.shape),
            "check the layer's input",
        )
    check_groups("x", x, groups)
    if bias is not None:
        check_companion("bias", bias, w)
        if tuple(bias.shape) not in ((rows,), (groups, rows)):
            raise fail(
                "bias",
                f"({rows},) or ({groups}, {rows}) for w {tuple(w.shape)}",
                tuple(bias.shape),
                "pass one value per output",
            )
        tensors.append(("bias", bias))
    check_device(tensors)
    check_no_grad(tensors)
    return w


def check_lowrank_embedding(ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    tensors = [("w", w), ("ids", ids), ("u", u), ("v", v), ("core", core)]
    check_weight("w", w)
    if w.dim() != 2:
        raise fail("w", "(entries, n)", tuple(w.shape), "pass the weight of an embedding")
    check_factors(tensors[0], *tensors[2:4], reshape=False)
    check_cores(core, w, u.shape[1])
    check_dtype("ids", ids, [torch.int64, torch.int32])
    check_groups("ids", ids, core.shape[0])
    check_device(tensors)
    check_no_grad(tensors)
    return w


def check_grouped_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    check_dtype("x", x, WEIGHT_DTYPES)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise fail("x", "(rows, ..., n) with n >= 1", tuple(x.shape), "check the norm's input")
    if not (math.isfinite(eps) and eps >= 0):
        raise fail("eps", "a finite number of at least 0", eps, "pass the norm's own")
    values = [(name, t) for name, t in (("weight", weight), ("bias", bias)) if t is not None]
    n, groups = x.shape[-1], max([len(t) for _, t in values if t.dim() == 2], default=1)
    for name, value in values:
        check_companion(name, value, x)
        if tuple(value.shape) not in ((n,), (groups, n)):
            raise fail(
                name,
                f"({n},) or (G, {n}) for x {tuple(x.shape)}",
                tuple(value.shape),
                "pass one value per column, for all or for each group",
            )
        check_layout(name, value)
    check_groups("x", x, groups, of="weight or bias")
    check_device([("x", x), *values])
    check_no_grad([("x", x), *values])
    return x
