"""The tests of the ops once more, on Triton's kernels in Triton's interpreter: no GPU is needed.

Triton decides when a kernel is decorated whether it will be compiled or interpreted, so these runs
need processes of their own; conftest.py makes the backend their only target. The interpreter takes
about a second for a thousand blocks, so the largest shapes are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

TESTS = Path(__file__).parent

RUNS = {  # a file, and what is left of it
    "values": (
        "test_ops_values.py",
        "not 1151 and not a_plan_draws and not deterministic and not (many and nearest)",
    ),
    "memory": ("test_ops_memory.py", "triton and not matrix3 and not dtype2"),
    "noise": (
        "test_ops_noise.py",
        "triton and not 1151 and not dtype2 and not deterministic and not beta_times"
        " and not (view and dtype0)",
    ),
    "side path": ("test_ops_side_path.py", "triton and embedding"),
    "norm": ("test_ops_norm.py", "triton and not 1151"),
    "opcheck": ("test_ops_compile.py", "test_opcheck"),
    "updates": (
        "test_triton_updates.py",
        "(not several or 100 or (200 and bf16)) and (not layout or (24 and stochastic))"
        " and not (cut and fp32)",
    ),
}


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="is such a run itself")
@pytest.mark.parametrize("name", RUNS)
def test_the_ops_on_the_interpreter(name):
    file, selected = RUNS[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", file, "-k", selected],
        cwd=TESTS,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
