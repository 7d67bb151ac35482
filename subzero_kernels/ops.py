"""The ops, registered in the torch.library namespace ``subzero``.

Each op is defined once: its schema, one check that the real and the fake call share, and a real
call that picks the backend. In-place ops return nothing. Every op is deterministic and leaves all
arguments as they were when it raises.

Shared conventions
    w       any shape, fp32, bf16 or fp16 (float64 on the reference backend); contiguous, or a
            matrix with contiguous rows
    u, v    (m', r) and (n', r) in w's dtype or fp32, m' n' = numel of w, r <= min(m', n')
    coeff   fp32 (K,) with K >= 1, on the device: one coefficient per query
    rng     int64 (2,), [seed, draw], on the device; query k reads draw + k
    stream  uint32, stream_id(purpose, index)
    Accumulation is in fp32 with one rounding at the store: "nearest", or "stochastic" for 16 bits.

Errors
    ValueError or TypeError (dtype) naming the argument, what was expected, what came and a remedy:
    shapes, dtypes, devices, layouts, overlapping memory, rank above min(m', n'), an argument that
    requires grad while grad mode is on.
    RuntimeError when SUBZERO_BACKEND names a backend that cannot run the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import known, validate
from .backends import choose, kind_of, load

NAMESPACE = "subzero"

# Registrations live as long as this object.
_library = torch.library.Library(NAMESPACE, "DEF")

OPS: list[str] = []


# ---- what is measured of a call, from the tensor that decides the backend and the arguments


def _kind_by_lead(lead: Tensor, *args: Any) -> str:
    return kind_of(lead.dtype, lead.numel())


def _kind_by_factors(lead: Tensor, w: object, u: Tensor, *args: Any) -> str:
    return kind_of(lead.dtype, lead.numel(), u.shape[1])


def _kind_by_lists(lead: Tensor, ws: object, us: Sequence[Tensor], *args: Any) -> str:
    return kind_of(lead.dtype, lead.numel(), us[0].shape[1])


def _kind_by_product(lead: Tensor, out: Tensor, weight: object, a: Tensor, *args: Any) -> str:
    return kind_of(a.dtype, a.shape[0] * out.shape[0], a.shape[1])


# ---- definitions


def _define(
    schema: str,
    check: Callable[..., Tensor | None],
    result: Callable[..., Tensor] | None = None,
    kind_by: Callable[..., str] = _kind_by_lead,
    lists: bool = False,
) -> Callable[..., Any]:
    """Register an op and return its bound overload.

    Args:
        schema: in the language of torch.library.
        check: takes the op's arguments; see validate.py.
        result: makes what a fake call returns; None for ops that work in place.
        kind_by: by what the backend is chosen.
        lists: the arguments are lists of tensors, coeff and rng, the first list being written: what
            was checked once is known again.
    """
    name = schema.partition("(")[0]

    def real(*args: Any, **kwargs: Any) -> Any:
        lead = check(*args, **kwargs)
        if lead is None:
            return None
        float64 = lead.dtype is torch.float64
        chosen = choose(name, lead.device.type, float64, kind_by(lead, *args))
        return chosen.function(*args, **kwargs)

    def real_of_lists(*args: Any, **kwargs: Any) -> None:
        facts = known.facts_of(name, args, kwargs)
        call = known.recall(facts, *args[-2:])
        if call is None:
            lead = check(*args, **kwargs)
            if lead is None:
                return
            float64 = lead.dtype is torch.float64
            call = known.Known(args[0], (lead.device.type, float64, kind_by(lead, *args)))
            known.remember(facts, call)
        chosen = choose(name, *call.chosen_by)
        if chosen.backend not in call.prepared:
            prepare = getattr(load(chosen.backend)[0], f"prepare_{name}", None)
            call.prepared[chosen.backend] = prepare and prepare(*args, **kwargs)
        run = call.prepared[chosen.backend]
        if run is None:
            chosen.function(*args, **kwargs)
        else:
            run(*args[-2:])

    def fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return None if result is None else result(*args, **kwargs)

    OPS.append(name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, real_of_lists if lists else real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.subzero, name).default


_philox4x32 = _define(
    "philox4x32(Tensor counter, Tensor key) -> Tensor",
    validate.check_philox4x32,
    lambda counter, key: torch.empty_like(counter),
)
_normal_ = _define(
    "normal_(Tensor(a!) out, Tensor rng, SymInt stream) -> ()",
    validate.check_normal_,
)
_perturb_ = _define(
    "perturb_(Tensor(a!) w, Tensor u, Tensor v, Tensor coeff, Tensor rng, *, SymInt stream,"
    " str rounding='nearest') -> ()",
    validate.check_perturb_,
    kind_by=_kind_by_factors,
)
_perturb_many_ = _define(
    "perturb_many_(Tensor(a!)[] ws, Tensor[] us, Tensor[] vs, Tensor coeff, Tensor rng, *,"
    " SymInt[] streams, str rounding='nearest') -> ()",
    validate.check_perturb_many_,
    kind_by=_kind_by_lists,
    lists=True,
)
_perturb_dense_ = _define(
    "perturb_dense_(Tensor(a!)[] ws, Tensor coeff, Tensor rng, *, SymInt[] streams,"
    " str rounding='nearest') -> ()",
    validate.check_perturb_dense_,
    lists=True,
)
_core_noise_ = _define(
    "core_noise_(Tensor(a!)[] out, Tensor[] base, Tensor coeff, Tensor rng, *, SymInt[] streams,"
    " float[] mu) -> ()",
    validate.check_core_noise_,
    lists=True,
)
_fold_ = _define(
    "fold_(Tensor(a!) w, Tensor u, Tensor v, Tensor core, *, float decay=1.0,"
    " str rounding='nearest', Tensor? rng=None, SymInt stream=0) -> ()",
    validate.check_fold_,
    kind_by=_kind_by_factors,
)
_add_noise_ = _define(
    "add_noise_(Tensor(a!) y, Tensor scale, Tensor query, Tensor rows, Tensor rng, *,"
    " SymInt stream) -> ()",
    validate.check_add_noise_,
)
_noise_outer_ = _define(
    "noise_outer_(Tensor(a!) out, Tensor weight, Tensor a, Tensor rows, Tensor rng, *,"
    " SymInt stream, float beta=0.0) -> ()",
    validate.check_noise_outer_,
    kind_by=_kind_by_product,
)
_lowrank_linear = _define(
    "lowrank_linear(Tensor x, Tensor w, Tensor? bias, Tensor u, Tensor v, Tensor core) -> Tensor",
    validate.check_lowrank_linear,
    lambda x, w, bias, u, v, core: x.new_empty((*x.shape[:-1], w.shape[0])),
)
_lowrank_embedding = _define(
    "lowrank_embedding(Tensor ids, Tensor w, Tensor u, Tensor v, Tensor core) -> Tensor",
    validate.check_lowrank_embedding,
    lambda ids, w, u, v, core: w.new_empty((*ids.shape, w.shape[1])),
)
_grouped_norm = _define(
    "grouped_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred) -> Tensor",
    validate.check_grouped_norm,
    lambda x, weight, bias, eps, centred: x.new_empty(x.shape),
)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Raw words of Philox4x32-10 (Salmon et al., SC 2011), for tests and other packages.

    Args:
        counter: int64 (N, 4); the low 32 bits of each entry are read.
        key: int64 (2,); likewise.

    Returns:
        int64 (N, 4), each in [0, 2**32).
    """
    return _philox4x32(counter, key)


def normal_(out: Tensor, rng: Tensor, stream: int) -> None:
    """Fill ``out`` with the contract's standard normals of (seed, draw, stream).

    Args:
        out: any shape, fp32, bf16 or fp16 (rounded to nearest from fp32), contiguous or a matrix
            with contiguous rows.
        rng: int64 (2,), [seed, draw].
        stream: uint32.
    """
    _normal_(out, rng, stream)


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
    """W += mu sum_k coeff[k] U Z_(draw + k) V^T, in place, with mu = sqrt(m' n') / r.

    Z_d is the r x r standard normal noise of ``stream`` at draw d. Source: SubZero, arXiv
    2410.08989: coeff = [eps], then [-2 eps], then [eps] is the paper's loop, [-lr rho] its update.

    Args:
        w: any shape with numel = m' n', read row-major as (m', n').
        u, v: (m', r) and (n', r), bases with orthonormal columns.
        coeff: fp32 (K,).
        rng: int64 (2,), [seed, draw].
        stream: uint32, stream_id(PURPOSE_CORE, index).
        rounding: "nearest", or "stochastic": words of the stream with purpose 4 at ``draw``; for
            fp32 the same as nearest.
    """
    _perturb_(w, u, v, coeff, rng, stream=stream, rounding=rounding)


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
    """:func:`perturb_` on many matrices in one launch, bit for bit the same.

    Shapes, ranks and dtypes may differ. For hot loops :func:`perturb_plan` validates once. Empty
    lists are no error and do nothing.

    Args:
        ws, us, vs: lists of one length, as in :func:`perturb_`; no two ws may share memory.
        coeff, rng, rounding: as in :func:`perturb_`, shared by all.
        streams: one uint32 per matrix.
    """
    _perturb_many_(ws, us, vs, coeff, rng, streams=streams, rounding=rounding)


def perturb_dense_(
    ws: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    rounding: str = "nearest",
) -> None:
    """W += sum_k coeff[k] z_(draw + k) with z a standard normal per element and no mu, in place.

    For parameters of one dimension, and for MeZO (arXiv 2305.17333). Empty lists are no error and
    do nothing.

    Args:
        ws: list of tensors of any shape.
        coeff, rng, rounding: as in :func:`perturb_`, shared by all.
        streams: one uint32 per tensor, stream_id(PURPOSE_DENSE, index).
    """
    _perturb_dense_(ws, coeff, rng, streams=streams, rounding=rounding)


def core_noise_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    coeff: Tensor,
    rng: Tensor,
    *,
    streams: Sequence[int],
    mu: Sequence[float],
) -> None:
    """out_g = base + mu sum_k coeff[g, k] Z_(draw + k) for the cores of all matrices.

    The update of a step is G = 1 with coeff[0, k] = -lr rho_k / K and out[i] = base[i][None]; the
    cores of its evaluations have coeff[g, k] = s_g eps at k = k_g and 0 elsewhere. Empty lists are
    no error and do nothing.

    Args:
        out: list of (G, r_i, r_i), fp32, contiguous. For G = 1 out[i] may be the memory of base[i].
        base: list of (r_i, r_i), fp32, contiguous.
        coeff: fp32 (G, K), G and K >= 1.
        rng: int64 (2,), [seed, draw].
        streams: one uint32 per matrix, stream_id(PURPOSE_CORE, index).
        mu: one finite number per matrix, rounded to fp32: sqrt(m n) / r.
    """
    _core_noise_(out, base, coeff, rng, streams=streams, mu=mu)


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
    """W = decay W + U S V^T, in place and in one pass.

    Args:
        w, u, v: as in :func:`perturb_`.
        core: S, fp32 (r, r), contiguous.
        decay: finite number.
        rounding: "nearest" or "stochastic"; the latter needs ``rng`` and ``stream``, also for fp32,
            where it changes nothing.
        rng: int64 (2,), [seed, number of folds so far].
        stream: uint32; its index names the words, its purpose is replaced by 4.
    """
    _fold_(w, u, v, core, decay=decay, rounding=rounding, rng=rng, stream=stream)


def add_noise_(
    y: Tensor, scale: Tensor, query: Tensor, rows: Tensor, rng: Tensor, *, stream: int
) -> None:
    """y[g, i] += scale[g, i] z_(draw + query[g])[rows[i]], in place: noise on chosen activations.

    z_d is the matrix of standard normals of ``stream`` at draw d, c columns wide: element
    row * c + column. Source: node perturbation (Ren et al., arXiv 2210.03310), where ``scale`` is
    eps times the norm of the layer's input.

    Args:
        y: (G, N, c), fp32, bf16 or fp16, with contiguous rows (the last axis); the first two axes
            may have any strides at which no two rows overlap.
        scale: fp32 (G, N), contiguous. A row whose scale is 0 keeps its bits, whatever it holds.
        query: int64 (G,), the query of each group, added to the draw modulo 2**32.
        rows: int64 (N,), shared by all groups; rows >= 0 and (rows + 1) c < 2**63. A row that comes
            twice gets the same noise twice.
        rng: int64 (2,), [seed, draw].
        stream: uint32, stream_id(PURPOSE_ACTIVATION, index).
    """
    _add_noise_(y, scale, query, rows, rng, stream=stream)


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
    """out = beta out + sum_k sum_i weight[k, i] z_(draw + k)[rows[i]]^T a[i], in place.

    The gradient that the noise of :func:`add_noise_` estimates: with weight the change of the loss
    over eps and a the layer's normalised input, out is G of the layer's (c, r) weight, or, with a
    times a basis, its projection (node perturbation, Ren et al., arXiv 2210.03310). The noise is
    made again and never stored whole; a weight of 0 costs no noise.

    Args:
        out: (c, r), fp32, with contiguous rows; not read if ``beta`` is 0.
        weight: fp32 (K, N), contiguous, K >= 1: one number for each query and row.
        a: (N, r), fp32, bf16 or fp16, with contiguous rows.
        rows: int64 (N,), as in :func:`add_noise_`.
        rng: int64 (2,), [seed, draw]; query k reads draw + k.
        stream: uint32, stream_id(PURPOSE_ACTIVATION, index).
        beta: finite number.
    """
    _noise_outer_(out, weight, a, rows, rng, stream=stream, beta=beta)


def lowrank_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, core: Tensor
) -> Tensor:
    """y = x W^T + b + ((x V) C_g^T) U^T: a linear layer at W + U C_g V^T for each group g.

    W is only read, and no matrix of its size is made by the native backends.

    Args:
        x: (G rows, ..., n) of w's dtype, any strides; its leading axis is G equal groups, group by
            group. With G = 1 any number of dimensions from one.
        w: (m, n), rows contiguous, or the transposed view of such a matrix (GPT-2's Conv1D:
            weight.T).
        bias: None, (m,) or (G, m), in w's dtype or fp32.
        u, v: (m, r) and (n, r), in w's dtype or fp32.
        core: C, fp32 (G, r, r), contiguous.

    Returns:
        (G rows, ..., m) of w's dtype, contiguous.
    """
    return _lowrank_linear(x, w, bias, u, v, core)


def lowrank_embedding(ids: Tensor, w: Tensor, u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    """Rows E[i] + (U[i] C_g) V^T: an embedding at E + U C_g V^T for each group g, with E read only.

    Args:
        ids: int64 or int32, any shape; its leading axis is G equal groups. Values in [0, entries).
        w: E, (entries, n), rows contiguous.
        u, v: (entries, r) and (n, r), in w's dtype or fp32.
        core: C, fp32 (G, r, r), contiguous.

    Returns:
        (*ids.shape, n) of w's dtype, contiguous.
    """
    return _lowrank_embedding(ids, w, u, v, core)


def grouped_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> Tensor:
    """y = n(x) * weight_g + bias_g, a norm over the last axis whose weights are a group's own.

    n(x) is (x - mean) / sqrt(var + eps) if centred (layer norm), else x / sqrt(mean(x^2) + eps)
    (RMS norm, arXiv 1910.07467). All in fp32 with one rounding at the store.

    Args:
        x: (G rows, ..., n), any strides; its leading axis is G equal groups, group by group.
        weight, bias: None, (n,) for all groups, or (G, n), in x's dtype or fp32, rows contiguous.
        eps: finite number of at least 0.

    Returns:
        x's shape and dtype, contiguous.
    """
    return _grouped_norm(x, weight, bias, eps, centred)
