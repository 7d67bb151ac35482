"""Tensors of more than 2**31 elements, each of 4.3 GB, on both GPU backends.

Where an index has 32 bits, an element past the border is written, or drawn, as another one.
The CUDA kernels that test_native_cuda*.py hold to this themselves are left out.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_cases import basis, close
from torch import Tensor

import subzero_kernels as sk
from subzero_kernels import backends
from subzero_kernels.rng import row_normals

pytestmark = pytest.mark.gpu

COLUMNS, RANK = 1 << 16, 16
BORDER = (1 << 31) // COLUMNS  # the first row past 2**31 elements
ROWS = BORDER + 33
CHECKED = [0, 1, BORDER - 1, BORDER, ROWS - 2, ROWS - 1]
STREAM = 7
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """One of these tests at a time, whatever the number of workers that share the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    with open(Path(tempfile.gettempdir()) / "subzero_test_gpu_large", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < 6 << 30:
            pytest.skip("needs 6 GB of free GPU memory")
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch):
    def force(backend: str) -> None:
        module, why = backends.load(backend)
        if module is None:
            pytest.skip(why)
        monkeypatch.setenv(backends.VARIABLE, backend)

    return force


def arguments() -> tuple[Tensor, Tensor]:
    return torch.tensor([1e-2], device="cuda"), sk.make_rng(3, 5, "cuda")


def noise(rng: Tensor, rows: list[int]) -> Tensor:
    """Rows of the stream's normals as a matrix of COLUMNS."""
    return row_normals(rng, STREAM, torch.tensor(rows, device="cuda"), COLUMNS)


def nearly(got: Tensor, expected: Tensor) -> bool:
    """Equal up to the normals' 4 ulp and their rounding to bf16."""
    return torch.allclose(got.float(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("op", ["normal_", "perturb_dense_", "add_noise_"])
def test_noise_by_triton(op, force):
    force("triton")
    coeff, rng = arguments()
    w = torch.zeros(ROWS, COLUMNS, dtype=BF16, device="cuda")
    z = noise(rng, CHECKED)
    if op == "normal_":
        sk.normal_(w, rng, STREAM)
    elif op == "perturb_dense_":
        sk.perturb_dense_([w], coeff, rng, streams=[STREAM])
        z = coeff * z
    else:
        scale = torch.zeros(1, ROWS, device="cuda")
        scale[0, CHECKED] = 1.0
        rows = torch.arange(ROWS, device="cuda")
        sk.add_noise_(w[None], scale, torch.zeros_like(rows[:1]), rows, rng, stream=STREAM)
        assert not w[2].any() and not w[BORDER + 1].any()
    assert nearly(w[CHECKED], z)


@pytest.mark.parametrize(
    ("backend", "op"),
    [
        ("triton", "perturb_"),
        ("triton", "perturb_many_"),
        ("triton", "fold_"),
        ("cuda", "perturb_many_"),
        ("cuda", "fold_"),
    ],
)
def test_low_rank_updates(backend, op, force):
    force(backend)
    coeff, rng = arguments()
    w = torch.ones(ROWS, COLUMNS, dtype=BF16, device="cuda")
    u, v = basis(ROWS, RANK, BF16), basis(COLUMNS, RANK, BF16)
    core = torch.zeros(RANK, RANK, device="cuda")
    decay = 1.0
    mu = (ROWS * COLUMNS) ** 0.5 / RANK
    if op == "fold_":
        core, decay = 1e-2 * mu * core.normal_(), 0.5
        sk.fold_(w, u, v, core, decay=decay)
    else:
        sk.core_noise_([core[None]], [core], coeff[None], rng, streams=[STREAM], mu=[mu])
        if op == "perturb_":
            sk.perturb_(w, u, v, coeff, rng, stream=STREAM)
        else:
            small = [torch.ones(40, 24, dtype=BF16, device="cuda"), basis(40, 8, BF16)]
            ws, us, vs = [small[0], w], [small[1], u], [basis(24, 8, BF16), v]
            sk.perturb_many_(ws, us, vs, coeff, rng, streams=[1, STREAM])
    added = u[CHECKED].double() @ core.double() @ v.double().T
    for row, term in zip(CHECKED, added, strict=True):
        assert term.norm() > 1e-3 * COLUMNS**0.5  # in bf16 it is seen beside 1
        close(w[row], decay + term, term)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_lowrank_embedding(backend, force):
    force(backend)
    w = torch.zeros(ROWS, COLUMNS, dtype=BF16, device="cuda")
    for row in CHECKED:
        w[row].normal_()
    u, v = basis(ROWS, RANK, BF16), basis(COLUMNS, RANK, BF16)
    core, ids = torch.randn(1, RANK, RANK, device="cuda"), torch.tensor(CHECKED, device="cuda")
    got = sk.lowrank_embedding(ids, w, u, v, core)
    base, tail = w[ids].double(), u[ids].double() @ core[0].double() @ v.double().T
    close(got, base + tail, torch.stack((base, tail)))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_noise_outer_(backend, force):
    """Of a long `a`, the last rows of which alone have weights."""
    force(backend)
    count, width, columns, some = (1 << 25) + 9, 64, 8, 20
    _, rng = arguments()
    a = torch.ones(count, width, dtype=BF16, device="cuda")
    a[-some:].normal_()
    weight = torch.zeros(1, count, device="cuda")
    weight[0, -some:] = torch.randn(some, device="cuda")
    rows = torch.arange(count, device="cuda")
    out = torch.empty(columns, width, device="cuda")
    sk.noise_outer_(out, weight, a, rows, rng, stream=STREAM)
    z = row_normals(rng, STREAM, rows[-some:], columns).double()
    exact = (weight[0, -some:, None].double() * z).T @ a[-some:].double()
    close(out, exact, exact)
