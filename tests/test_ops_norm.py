"""grouped_norm against float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, on

import subzero_kernels as sk


def exact_norm(x, weight, bias, eps, centred, groups):
    """(G, rows, n) in float64."""
    n = x.shape[-1]
    x = x.double().reshape(groups, -1, n)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.double().reshape(-1, 1, n)
    return y if bias is None else y + bias.double().reshape(-1, 1, n)


def assert_norm(got, x, weight, bias, eps, centred, groups):
    exact = exact_norm(x, weight, bias, eps, centred, groups)
    store = (exact.to(got.dtype).double() - exact).norm()
    error = (got.cpu().double().reshape(exact.shape) - exact).norm()
    assert error <= 1.01 * store + 1e-6 * exact.norm()  # fp32 within, rounded once


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("groups", "n"), [(1, 7), (2, 64), (3, 129), (5, 1151)])
def test_values(target, groups, n, centred, dtype):
    x = (torch.randn(groups * 2, 3, n) * 3 + 1).to(dtype)
    weight, bias = torch.randn(groups, n), torch.randn(groups, n)
    x_, w_, b_ = on(target.device, x, weight, bias)
    got = sk.grouped_norm(x_, w_, b_, 1e-5, centred=centred)
    assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
    assert_norm(got, x, weight, bias, 1e-5, centred, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "bias"),
    [("none", "none"), ("all", "none"), ("none", "group"), ("group", "all"), ("own all", "group")],
)
def test_one_for_all_or_one_a_group_or_none(target, weight, bias, dtype):
    def made(kind):
        if kind == "none":
            return None
        value = torch.randn(2, 33) if kind == "group" else torch.randn(33)
        return value.to(dtype) if "own" in kind else value

    w, b, x = made(weight), made(bias), torch.randn(4, 33).to(dtype)
    placed = [None if t is None else t.to(target.device) for t in (w, b)]
    got = sk.grouped_norm(x.to(target.device), *placed, 1e-6, centred=True)
    assert_norm(got, x, w, b, 1e-6, True, 2)


def test_a_group_sees_its_own_values_only(target):
    """And many rows a group take turns in one program."""
    x = torch.randn(3, 40, 16).to(target.device).repeat(3, 1, 1)
    weight, bias = torch.randn(3, 16).to(target.device), torch.randn(3, 16).to(target.device)
    got = sk.grouped_norm(x, weight, bias, 1e-5, centred=True)
    for g in range(3):
        alone = sk.grouped_norm(x[:3], weight[g], bias[g], 1e-5, centred=True)
        assert torch.equal(got[3 * g : 3 * g + 3], alone)
    poisoned = x.clone()
    poisoned[3:6] = torch.nan
    after = sk.grouped_norm(poisoned, weight, bias, 1e-5, centred=True)
    assert torch.equal(after[:3], got[:3]) and torch.equal(after[6:], got[6:])
    assert after[3:6].isnan().all()


def test_values_near_one_are_not_rounded_to_16_bits(target):
    """weight = 1 + 2**-13 on rows of +-1, minus 1 in the bias: what is left is the weight's."""
    x = torch.tensor([1.0, -1.0] * 8).repeat(4, 1).bfloat16().to(target.device)
    weight = torch.full((2, 16), 1 + 2.0**-13).to(target.device)
    bias = torch.tensor([-1.0, 1.0] * 8).repeat(2, 1).to(target.device)
    got = sk.grouped_norm(x, weight, bias, 0.0, centred=True)
    expected = 2.0**-13 * x.float()
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=0)


def test_values_that_are_slices_of_all_parameters(target):
    flat = torch.randn(2, 100).to(target.device)
    weight, bias, x = flat[:, 8:40], flat[:, 41:73], torch.randn(4, 32).to(target.device)
    got = sk.grouped_norm(x, weight, bias, 1e-5, centred=True)
    whole = sk.grouped_norm(x, weight.contiguous(), bias.contiguous(), 1e-5, centred=True)
    assert torch.equal(got, whole)


@pytest.mark.parametrize("layout", ["transposed", "rows of a wider tensor", "empty"])
def test_any_strides_of_x(target, layout):
    wide = torch.randn(6, 5, 48).to(target.device)
    x = {
        "transposed": wide.transpose(0, 1)[:4],
        "rows of a wider tensor": wide[:, 0, 8:40],
        "empty": wide[:, :0],
    }[layout]
    n = x.shape[-1]
    weight = torch.randn(2, n).to(target.device)
    got = sk.grouped_norm(x, weight, None, 1e-5, centred=False)
    assert got.is_contiguous() and got.shape == x.shape
    assert torch.equal(got, sk.grouped_norm(x.contiguous(), weight, None, 1e-5, centred=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(32, 2048), (1024, 5120), (8192, 4096), (3, 40000)])
def test_sizes_of_real_models(rows, n, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(rows * 2, n, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(2, n, device="cuda", generator=generator)
    bias = torch.randn(2, n, device="cuda", generator=generator)
    for centred in (True, False):
        got = sk.grouped_norm(x, weight, bias, 1e-5, centred=centred)
        assert_norm(got, x.cpu(), weight.cpu(), bias.cpu(), 1e-5, centred, 2)
        again = sk.grouped_norm(x, weight, bias, 1e-5, centred=centred)
        assert torch.equal(got, again)
