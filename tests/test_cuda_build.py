"""The build refuses hot CUDA kernels that spill registers (csrc/cuda/no_spills.py)."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "csrc" / "cuda" / "no_spills.py"
NO_SPILLS = runpy.run_path(str(SCRIPT))

# 64 sums live at once: they fit in the registers, unless a thread may have 24 of them only.
KERNEL = """
__global__ void sums(const float* in, float* out, int n) {
  float sum[64] = {};
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int j = 0; j < 64; ++j) sum[j] += in[(i ^ j) * n] * in[i + 3 * j];
#pragma unroll
  for (int j = 0; j < 64; ++j) out[threadIdx.x * 64 + j] = sum[j];
}
"""


def report(name: str, stores: int, stack: int = 0, architecture: str = "sm_90a") -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{architecture}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {stores} bytes spill loads\n"
        f"ptxas info    : Used 128 registers, used 1 barriers\n"
    )


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (report("perturb_dense_kernel", 0), False),
        (report("perturb_dense_kernel", 4, 8), True),
        (report("perturb_dense_kernel", 4, 8, "sm_86"), False),
        (report("perturb_dense_kernel", 0, 64), True),
        (report("good", 0) + report("bad", 8, 8), True),
    ],
    ids=["none", "spills", "another chip", "an array in memory", "the second"],
)
def test_what_is_refused(text, refused):
    assert bool(NO_SPILLS["offenders"](text)) == refused


def test_every_exception_names_a_kernel_and_a_limit():
    for pattern, most in NO_SPILLS["ALLOWED"]:
        assert "_kernel" in pattern and 0 < most < 256


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which(os.environ.get("CUDACXX") or "nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        pytest.skip("nvcc is not installed: no CUDA kernel is compiled here")
    return found


@pytest.mark.parametrize("registers", [255, 24])
def test_a_compilation_that_spills_fails(nvcc, tmp_path, registers):
    source = tmp_path / "sums.cu"
    source.write_text(KERNEL)
    command = [nvcc, "-gencode=arch=compute_90a,code=sm_90a", f"-maxrregcount={registers}"]
    command += ["-c", str(source), "-o", str(tmp_path / "sums.o")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command], stderr=subprocess.PIPE, text=True
    )
    if registers == 24:
        assert done.returncode == 1 and "sums" in done.stderr and "spills" in done.stderr
    else:
        assert done.returncode == 0 and done.stderr == ""
        assert (tmp_path / "sums.o").stat().st_size > 0


def test_errors_of_the_compiler_come_through(nvcc, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { nonsense; }")
    command = [nvcc, "-c", str(source), "-o", str(tmp_path / "wrong.o")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode and "nonsense" in done.stderr
