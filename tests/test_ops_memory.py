"""Where the ops write: views of wider buffers, neighbours, shared memory."""

from __future__ import annotations

import math

import pytest
import torch

import subzero_kernels as sk
from subzero_kernels.overlap import clashes, overlap, region, regions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def basis(rows: int, rank: int, stream: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    # Made where it is used: a forced backend takes tensors of its own device only.
    kind = dict(seed=1, window=0, stream=stream, dtype=dtype, device=device)
    return sk.orthonormal_basis(rows, rank, **kind)


def arguments(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0.5, -0.25], device=device), sk.make_rng(1, 2, device)


def poisoned(rows: int, columns: int, dtype: torch.dtype, device: str):
    """A NaN buffer and the (rows, columns) view inside it, filled with numbers."""
    buffer = torch.full((rows + 4, columns + 9), math.nan, dtype=dtype, device=device)
    view = buffer[2 : rows + 2, 5 : columns + 5]
    view.copy_(torch.randn(rows, columns))
    return buffer, view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", ["perturb_", "perturb_many_", "perturb_dense_", "fold_"])
@pytest.mark.parametrize("matrix", [(33, 40), (1, 7), (129, 1), (30, 44)])
def test_a_view_is_written_as_if_it_were_contiguous_and_its_neighbours_stay(
    target, op, dtype, rounding, matrix
):
    shape = (33, 40) if matrix == (30, 44) else matrix  # (30, 44): the factors reshape the view
    buffer, view = poisoned(*shape, dtype, target.device)
    plain = view.clone().contiguous()
    rank = min(*matrix, 5)
    u = basis(matrix[0], rank, 1, dtype, target.device)
    v = basis(matrix[1], rank, 2, dtype, target.device)
    coeff, rng = arguments(target.device)
    core = torch.randn(rank, rank, device=target.device)
    for w in (view, plain):
        if op == "perturb_":
            sk.perturb_(w, u, v, coeff, rng, stream=3, rounding=rounding)
        elif op == "perturb_many_":
            sk.perturb_many_([w], [u], [v], coeff, rng, streams=[3], rounding=rounding)
        elif op == "perturb_dense_":
            sk.perturb_dense_([w], coeff, rng, streams=[3], rounding=rounding)
        else:
            sk.fold_(w, u, v, core, decay=0.9, rounding=rounding, rng=rng, stream=3)
    assert torch.equal(view, plain)
    assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bases_may_be_column_slices_of_a_wider_buffer(target, dtype):
    wide_u = basis(33, 12, 1, dtype, target.device)
    wide_v = basis(40, 12, 2, dtype, target.device)
    u, v = wide_u[:, 3:8], wide_v[:, 3:8]
    w = torch.randn(33, 40).to(dtype).to(target.device)
    coeff, rng = arguments(target.device)
    core = torch.randn(5, 5, device=target.device)
    strided, plain = w.clone(), w.clone()
    for out, a, b in ((strided, u, v), (plain, u.contiguous(), v.contiguous())):
        sk.perturb_(out, a, b, coeff, rng, stream=3)
        sk.fold_(out, a, b, core)
    assert torch.equal(strided, plain)
    x = torch.randn(4, 40).to(dtype).to(target.device)
    y = sk.lowrank_linear(x, w, None, u, v, core[None])
    assert torch.equal(y, sk.lowrank_linear(x, w, None, u.contiguous(), v.contiguous(), core[None]))


def test_column_slices_of_one_buffer_are_perturbed_together(target):
    """A fused QKV weight stored side by side: disjoint although the byte ranges interleave."""
    buffer = torch.randn(24, 48, device=target.device)
    expected = buffer.clone()
    u, v = (basis(n, 4, i, torch.float32, target.device) for i, n in ((1, 24), (2, 16)))
    coeff, rng = arguments(target.device)
    parts = list(buffer.split(16, dim=1))
    sk.perturb_many_(parts, [u] * 3, [v] * 3, coeff, rng, streams=[1, 2, 3])
    for i, part in enumerate(expected.split(16, dim=1)):
        sk.perturb_(part, u, v, coeff, rng, stream=i + 1)
    assert torch.equal(buffer, expected)


def test_empty_lists_and_empty_tensors_do_nothing(target):
    coeff, rng = arguments(target.device)
    sk.perturb_many_([], [], [], coeff, rng, streams=[])
    sk.perturb_plan([], [], [], []).perturb_(coeff, rng)
    sk.perturb_dense_([], coeff, rng, streams=[])
    sk.core_noise_([], [], coeff[None], rng, streams=[], mu=[])
    sk.normal_(torch.empty(0, 3, device=target.device), rng, 1)
    w = torch.zeros(5, device=target.device)
    empty = torch.zeros(0, device=target.device)
    sk.perturb_dense_([empty, w], coeff, rng, streams=[1, 2])
    alone = torch.zeros(5, device=target.device)
    sk.perturb_dense_([alone], coeff, rng, streams=[2])
    assert torch.equal(w, alone) and w.abs().max() > 0


def exact_overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one buffer share an element, by listing all their offsets."""

    def offsets(t: torch.Tensor) -> set[int]:
        index = torch.zeros(t.shape, dtype=torch.int64)
        for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
            shape = [1] * t.dim()
            shape[dim] = size
            index += (torch.arange(size) * stride).reshape(shape)
        return set((index + t.storage_offset()).flatten().tolist())

    return not offsets(a).isdisjoint(offsets(b))


def test_overlap_is_exact_for_all_pairs_of_small_views():
    """Views of every pitch, width, height and offset of a small buffer, against their offsets."""
    buffer = torch.zeros(40)
    views = [
        buffer.as_strided((rows, width), (pitch, 1), offset)
        for pitch in (3, 4, 6)
        for width in range(1, pitch + 1)
        for rows in (1, 2, 3)
        for offset in range(0, 14, 2)
    ]
    regions = [region(str(i), view, written=True) for i, view in enumerate(views)]
    # Reproducible samples of the 30,000 pairs, which would take a minute.
    pairs = torch.randint(0, len(views), (3000, 2)).tolist()
    results = {True: 0, False: 0}
    for i, j in pairs:
        expected = exact_overlap(views[i], views[j])
        assert overlap(regions[i], regions[j]) == expected, (regions[i], regions[j])
        results[expected] += 1
    assert min(results.values()) > 100


def test_the_regions_of_groups_of_rows_hold_their_elements_and_no_others():
    """(G, N, c) views with either axis outside, evenly spaced or not, against small segments."""
    buffer = torch.zeros(200)
    counts = set()
    for groups, rows, columns, gaps in [(2, 3, 4, (1, 5)), (3, 2, 2, (0, 3)), (1, 3, 5, (2, 0))]:
        pitch = columns + gaps[0]
        outside = (rows * pitch + gaps[1], pitch, 1)
        inside = (pitch, groups * pitch + gaps[1], 1)
        for strides in (outside, inside, (rows * pitch, pitch, 1), (pitch, groups * pitch, 1)):
            view = buffer.as_strided((groups, rows, columns), strides, 7)
            held = regions("view", view, written=True)
            counts.add(len(held))
            for start in range(70):
                for width in (1, 2):
                    other = buffer[start : start + width]
                    found = clashes([*held, region("other", other, written=False)])
                    assert bool(list(found)) == exact_overlap(view, other), (strides, start)
    assert 1 in counts and max(counts) > 1


def test_clashes_finds_every_written_pair_and_no_other():
    buffer = torch.zeros(100)
    named = {
        "a": (buffer[0:20], True),
        "b": (buffer[10:30], False),
        "c": (buffer[15:40], False),
        "d": (buffer[40:60], True),
        "e": (buffer[59:61], False),
        "other": (torch.zeros(100), True),
    }
    found = clashes(region(name, t, written=written) for name, (t, written) in named.items())
    assert {(w.name, o.name) for w, o in found} == {("a", "b"), ("a", "c"), ("d", "e")}


def test_overlap_sees_two_storages_over_the_same_memory():
    array = torch.zeros(16).numpy()
    a, b = torch.from_numpy(array), torch.from_numpy(array[8:])
    assert overlap(region("a", a, written=True), region("b", b, written=True))
