"""lowrank_linear and lowrank_embedding against float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, SHAPES, assert_close, double, linear_case, on

import subzero_kernels as sk


def assert_linear(got, x, w, bias, u, v, core, groups):
    """Base product and tail both count as added: the op forms both."""
    x, w, u, v, core = double(x, w, u, v, core)
    rows = x.reshape(groups, -1, w.shape[1])
    base = rows @ w.T
    tail = rows @ v @ core.mT @ u.T
    exact = base + tail
    if bias is not None:
        exact = exact + bias.double().reshape(-1, 1, w.shape[0])
    assert_close(got.reshape(exact.shape), exact, torch.stack((base, tail)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_lowrank_linear(target, rows, columns, rank, groups, dtype):
    w, u, v, core = linear_case(rows, columns, rank, groups, dtype)
    x = torch.randn(groups * 2, 5, columns).to(dtype)
    bias = torch.randn(rows).to(dtype)
    x_, w_, b_, u_, v_, core_ = on(target.device, x, w, bias, u, v, core)
    got = sk.lowrank_linear(x_, w_, b_, u_, v_, core_)
    assert got.shape == (groups * 2, 5, rows) and got.dtype == dtype and got.is_contiguous()
    assert_linear(got, x, w, bias, u, v, core, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "own", "per group", "fp32", "fp32 per group"])
def test_lowrank_linear_adds_its_bias(target, dtype, bias):
    w, u, v, core = linear_case(40, 24, 5, 2, dtype)
    x = torch.randn(6, 24).to(dtype)
    shape = (2, 40) if "group" in bias else (40,)
    b = (
        None
        if bias == "none"
        else torch.randn(shape).to(torch.float32 if "fp32" in bias else dtype)
    )
    x_, w_, u_, v_, core_ = on(target.device, x, w, u, v, core)
    got = sk.lowrank_linear(x_, w_, None if b is None else b.to(target.device), u_, v_, core_)
    assert_linear(got, x, w, b, u, v, core, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_bias_is_not_rounded_before_it_is_added(target, dtype):
    """x W^T = -1 and bias = 1 + 2**-13: a bias rounded to 16 bits would give 0."""
    w, bias = -torch.eye(8).to(dtype), torch.full((8,), 1 + 2.0**-13)
    u, core = torch.eye(8)[:, :2].to(dtype).contiguous(), torch.zeros(1, 2, 2)
    x_, w_, b_, u_, core_ = on(target.device, torch.ones(3, 8).to(dtype), w, bias, u, core)
    got = sk.lowrank_linear(x_, w_, b_, u_, u_, core_)
    assert torch.equal(got.cpu(), torch.full((3, 8), 2.0**-13, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "row-strided", "transposed row-strided"])
def test_lowrank_linear_takes_weight_views(target, dtype, layout):
    _, u, v, core = linear_case(40, 24, 5, 2, dtype)
    wide = torch.randn(80, 80).to(dtype).to(target.device)
    w = {
        "transposed": wide[:24].reshape(-1)[: 24 * 40].view(24, 40).T,
        "row-strided": wide[5:45, 7:31],
        "transposed row-strided": wide[5:29, 7:47].T,
    }[layout]
    assert not w.is_contiguous()
    x = torch.randn(6, 24).to(dtype)
    x_, u_, v_, core_ = on(target.device, x, u, v, core)
    got = sk.lowrank_linear(x_, w, None, u_, v_, core_)
    assert_linear(got, x, w, None, u, v, core, 2)


@pytest.mark.parametrize("shape", [(6, 24), (6, 2, 24), (6, 2, 3, 24), (0, 24), (6, 0, 24)])
def test_lowrank_linear_keeps_the_leading_axes(target, shape):
    w, u, v, core = linear_case(40, 24, 5, 3, torch.float32)
    x = torch.randn(shape)
    got = sk.lowrank_linear(*on(target.device, x, w), None, *on(target.device, u, v, core))
    assert got.shape == (*shape[:-1], 40)
    if x.numel():
        assert_linear(got, x, w, None, u, v, core, 3)


def test_lowrank_linear_takes_a_vector_and_strided_input(target):
    w, u, v, core = linear_case(40, 24, 5, 1, torch.float32)
    x = torch.randn(24, 3).T
    x_, w_, u_, v_, core_ = on(target.device, x, w, u, v, core)
    got = sk.lowrank_linear(x_, w_, None, u_, v_, core_)
    assert_linear(got, x, w, None, u, v, core, 1)
    vector = sk.lowrank_linear(x_[0], w_, None, u_, v_, core_)
    assert vector.shape == (40,)
    assert torch.allclose(vector, got[0], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (0, 5)])
def test_lowrank_embedding(target, shape, ids_dtype, dtype):
    w, u, v, core = linear_case(129, 24, 7, 3, dtype)
    ids = torch.randint(0, 129, shape, dtype=ids_dtype)
    got = sk.lowrank_embedding(*on(target.device, ids, w, u, v, core))
    assert got.shape == (*shape, 24) and got.dtype == dtype
    flat = ids.long().reshape(3, -1) if ids.numel() else ids.long().reshape(3, 0)
    base, tail = w.double()[flat], u.double()[flat] @ core.double() @ v.double().T
    assert_close(got.reshape(base.shape), base + tail, torch.stack((base, tail)))


def test_lowrank_embedding_refuses_ids_out_of_range():
    w, u, v, core = linear_case(10, 6, 2, 1, torch.float32)
    for bad in (10, -1):
        with pytest.raises(IndexError):
            sk.lowrank_embedding(torch.tensor([0, bad]), w, u, v, core)


def test_the_users_matmul_precision_is_left_alone(monkeypatch):
    monkeypatch.setenv("SUBZERO_BACKEND", "reference")
    before = torch.get_float32_matmul_precision()
    w, u, v, core = linear_case(64, 64, 8, 1, torch.float32)
    x = torch.randn(16, 64)
    try:
        torch.set_float32_matmul_precision("medium")
        got = sk.lowrank_linear(x, w, None, u, v, core)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_linear(got, x, w, None, u, v, core, 1)
