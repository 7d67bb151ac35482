"""Triton's low-rank updates on the paths that large matrices take, in the interpreter or on a GPU.

Small matrices are computed in fp32 (Kind.exact); here that is switched off, so that the halves, the
scaled rows and the blocks of columns are tested at sizes that the interpreter can do.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from op_cases import assert_close, factors

pytest.importorskip("triton", reason="Triton is not installed")

from subzero_kernels import backends, known, perturb_many_  # noqa: E402
from subzero_kernels.backends import reference  # noqa: E402
from subzero_kernels.backends import triton as backend  # noqa: E402
from subzero_kernels.backends.triton_kernels import plans, shapes  # noqa: E402
from subzero_kernels.rng import make_rng  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "fp32": (FP32, FP32, FP32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "bf16 on fp32": (BF16, FP32, FP32),
    "fp16 on fp32": (FP16, FP32, FP32),
    "bf16, u fp32": (BF16, FP32, BF16),
    "fp16, v fp32": (FP16, FP16, FP32),
}


@pytest.fixture(autouse=True)
def _inexact(monkeypatch):
    monkeypatch.setattr(plans, "_FEW", 0)


def case(rows: int, columns: int, rank: int, kind: str):
    w_dtype, u_dtype, v_dtype = KINDS[kind]
    w = torch.randn(rows, columns).to(w_dtype)
    u, v = (
        f.to(t) for f, t in zip(factors(rows, columns, rank, FP32), (u_dtype, v_dtype), strict=True)
    )
    return w.to(DEVICE), u.to(DEVICE), v.to(DEVICE)


def arguments(*coeff: float, draw: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(coeff, device=DEVICE), make_rng(3, draw, DEVICE)


def exactly(w, u, v, coeff, rng, stream) -> torch.Tensor:
    """What perturb_ adds, float64."""
    after = torch.zeros(w.shape, dtype=torch.float64)
    u, v, coeff, rng = (t.cpu() for t in (u, v, coeff, rng))
    reference.perturb_(after, u.double(), v.double(), coeff.double(), rng, stream=stream)
    return after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(70, 136, 8), (130, 72, 24), (72, 65, 33), (64, 80, 64)]
)
def test_values(rows, columns, rank, kind):
    w, u, v = case(rows, columns, rank, kind)
    coeff, rng = arguments(0.3, 0.0, -0.2)
    added = exactly(w, u, v, coeff, rng, 7)
    exact = w.cpu().double() + added
    backend.perturb_(w, u, v, coeff, rng, stream=7)
    assert_close(w, exact, added)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [65, 100, 128, 129, 200, 256])
def test_ranks_that_take_several_blocks_of_columns(rank, kind):
    w, u, v = case(rank + 8, rank + 24, rank, kind)
    coeff, rng = arguments(0.3)
    added = exactly(w, u, v, coeff, rng, 7)
    exact = w.cpu().double() + added
    backend.perturb_(w, u, v, coeff, rng, stream=7)
    assert_close(w, exact, added)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_updates_far_below_one(kind):
    w, u, v = case(72, 136, 24, kind)
    w.zero_()
    u[:40] *= 1e-4
    coeff, rng = arguments(1e-6)
    added = exactly(w, u, v, coeff, rng, 7)
    backend.perturb_(w, u, v, coeff, rng, stream=7)
    assert_close(w[:40], added[:40], added[:40])
    assert_close(w[40:], added[40:], added[40:])


def test_scaled_rows_of_all_sizes():
    """fp16 factors: rows of P from 1e-6 to 1e3, their sums large enough for fp16 W."""
    w, u, v = case(72, 136, 24, "fp16")
    w.zero_()
    rows = torch.logspace(-3, 2, 72, device=DEVICE)[:, None]
    u, v = (u * rows).half(), (v * 8).half()
    u[3] = 0
    coeff, rng = arguments(1e-2)
    added = exactly(w, u, v, coeff, rng, 7)
    backend.perturb_(w, u, v, coeff, rng, stream=7)
    for i in range(72):
        assert_close(w[i], added[i], added[i])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [24, 64])
def test_layout_and_list_change_no_bit(kind, rank, rounding):
    """Aligned, row-strided, misaligned, reshaped: the same sums in the same order."""
    w, u, v = case(72, 136, rank, kind)
    coeff, rng = arguments(0.3, -0.2)
    keywords = dict(stream=7, rounding=rounding)
    expected = w.clone()
    backend.perturb_(expected, u, v, coeff, rng, **keywords)

    buffer = torch.full((74, 150), math.nan, dtype=w.dtype, device=DEVICE)
    for left in (8, 3):
        view = buffer[1:73, left : left + 136]
        view.copy_(w)
        backend.perturb_(view, u, v, coeff, rng, **keywords)
        assert torch.equal(view, expected)
        buffer.fill_(math.nan)
    reshaped = torch.empty(144, 100, dtype=w.dtype, device=DEVICE)[:, 5:73]
    reshaped.copy_(w.reshape(144, 68))
    backend.perturb_(reshaped, u, v, coeff, rng, **keywords)
    assert torch.equal(reshaped, expected.reshape(144, 68))

    wide_u, wide_v = (torch.randn(len(f), rank + 9).to(f.dtype).to(DEVICE) for f in (u, v))
    wide_u[:, 3 : rank + 3], wide_v[:, 3 : rank + 3] = u, v
    strided = w.clone()
    factors_ = wide_u[:, 3 : rank + 3], wide_v[:, 3 : rank + 3]
    backend.perturb_(strided, *factors_, coeff, rng, **keywords)
    assert torch.equal(strided, expected)

    other = case(66, 40, 8, "bf16")
    listed = w.clone()
    backend.perturb_many_(
        [other[0], listed],
        [other[1], u],
        [other[2], v],
        coeff,
        rng,
        streams=[1, 7],
        rounding=rounding,
    )
    assert torch.equal(listed, expected)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_how_the_work_is_cut_changes_no_bit(kind, monkeypatch):
    """Items of one tile or of all, a program each or a few that take them in turn, wider tiles."""
    w, u, v = case(136, 264, 64, kind)
    coeff, rng = arguments(0.3)
    results = []
    chosen = shapes.update
    for change in (
        dict(),
        dict(most_tiles=1),
        dict(items=1, most_tiles=1000),
        dict(resident=1),
        dict(parts=4, registers=None),
        dict(rows=128, registers=None),
    ):
        monkeypatch.setattr(
            shapes, "update", lambda *a, c=change, **k: chosen(*a, **k)._replace(**c)
        )
        backend._launches.clear()
        got = w.clone()
        backend.perturb_many_([got], [u], [v], coeff, rng, streams=[7])
        results.append(got)
    backend._launches.clear()
    assert not torch.equal(results[0], w)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_fold(kind, decay):
    w, u, v = case(72, 136, 24, kind)
    core = torch.randn(24, 24)
    added = u.cpu().double() @ core.double() @ v.cpu().double().T
    exact = decay * w.cpu().double() + added
    backend.fold_(w, u, v, core.to(DEVICE), decay=decay)
    assert_close(w, exact, added)


def test_a_decay_is_not_rounded_to_fp32():
    """With next to nothing added, 1.1 times the store's rounding is all there is."""
    w, u, v = case(136, 264, 8, "fp32")
    exact = 0.9 * w.cpu().double()
    backend.fold_(w, u, v, torch.zeros(8, 8, device=DEVICE), decay=0.9)
    assert_close(w, exact, torch.zeros_like(exact))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "bf16 on fp32"])
@pytest.mark.parametrize("rank", [8, 33, 100])
def test_lowrank_embedding(kind, rank):
    w, u, v = case(130, 136, rank, kind)
    core = torch.randn(3, rank, rank)
    ids = torch.randint(0, 130, (6, 35))
    got = backend.lowrank_embedding(ids.to(DEVICE), w, u, v, core.to(DEVICE))
    flat = ids.reshape(3, -1)
    base, rows = w.cpu().double()[flat], u.cpu().double()[flat]
    tail = rows @ core.double() @ v.cpu().double().T
    assert_close(got.cpu().reshape(base.shape), base + tail, torch.stack((base, tail)))


def test_ids_out_of_range_give_nan():
    w, u, v = case(20, 24, 8, "fp32")
    ids = torch.tensor([3, 20, -1, 5], device=DEVICE)
    got = backend.lowrank_embedding(ids, w, u, v, torch.zeros(1, 8, 8, device=DEVICE))
    assert torch.equal(got[[0, 3]], w[[3, 5]])
    assert got[[1, 2]].isnan().all()


@pytest.mark.parametrize("op", ["perturb_", "perturb_many_"])
def test_an_error_of_the_driver_names_the_op_and_the_shapes(op, monkeypatch):
    w, u, v = case(20, 24, 8, "fp32")
    coeff, rng = arguments(0.1)
    name = {"perturb_": "update_one_kernel", "perturb_many_": "update_many_kernel"}[op]
    kernel = getattr(plans, name)

    class Broken:
        fn = kernel.fn

        def __getitem__(self, grid):
            raise ValueError("no such thing")

    monkeypatch.setattr(plans, name, Broken())
    if op == "perturb_":
        with pytest.raises(
            RuntimeError, match=r"^perturb_: .*\(20, 24\), \(20, 8\).*no such thing$"
        ):
            backend.perturb_(w, u, v, coeff, rng, stream=1)
    else:
        shapes = r"2 tensors, the first: w \(20, 24\), u \(20, 8\), v \(24, 8\)"
        with pytest.raises(RuntimeError, match=rf"^perturb_many_: .*{shapes}.*no such thing$"):
            backend.perturb_many_([w, w.clone()], [u, u], [v, v], coeff, rng, streams=[1, 2])


def listed(ranks: tuple[int, ...]) -> tuple[dict, list[torch.Tensor]]:
    """Arguments of perturb_many_, and copies of its matrices."""
    matrices = [case(rank + 8, rank + 16, rank, "bf16") for rank in ranks]
    ws, us, vs = (list(part) for part in zip(*matrices, strict=True))
    coeff, rng = arguments(0.5)
    given = dict(ws=ws, us=us, vs=vs, coeff=coeff, rng=rng, streams=list(range(len(ws))))
    return given, [w.clone() for w in ws]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_known_list_is_described_once(rounding, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    known.forget()
    described = []
    layout = backend._layout
    monkeypatch.setattr(backend, "_layout", lambda t: (described.append(t), layout(t))[1])
    given, start = listed((8, 24))
    results = []
    for coeff in (given["coeff"], given["coeff"].clone(), 2 * given["coeff"]):
        for w, before in zip(given["ws"], start, strict=True):
            w.copy_(before)
        perturb_many_(**given | dict(coeff=coeff), rounding=rounding)
        results.append([w.clone() for w in given["ws"]])
    assert len(described) == 6  # W, U and V of two matrices
    assert all(map(torch.equal, results[0], results[1]))
    assert not any(map(torch.equal, results[0], results[2]))  # coeff is read anew
    assert not any(map(torch.equal, results[0], start))


def test_what_a_capture_makes_and_high_ranks_are_not_kept(monkeypatch):
    assert backend.prepare_perturb_many_(**listed((8,))[0]) is not None
    assert backend.prepare_perturb_many_(**listed((8, 257))[0]) is None
    monkeypatch.setattr(backend, "capturing", lambda device: True)
    assert backend.prepare_perturb_many_(**listed((8,))[0]) is None
