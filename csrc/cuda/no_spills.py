"""A launcher of nvcc that fails where a kernel for Hopper spills registers.

    CMAKE_CUDA_COMPILER_LAUNCHER="python3;csrc/cuda/no_spills.py" pip install .

CMake puts it before each call of nvcc. It asks ptxas for what each kernel takes, keeps that to
itself, and passes on everything else. `make test` builds with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

ARCHITECTURE = "sm_90a"

# Bytes that may be spilled, by mangled name; all other kernels spill nothing.
ALLOWED = [
    (r"lowrank_left_kernel.*f16.*Li32E", 8),  # once, outside of loops
]


class Kernel(NamedTuple):
    name: str
    architecture: str
    stack: int  # bytes
    stores: int  # bytes spilled


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'\n"
    r".*Function properties for \S+\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores",
)
_PTXAS = re.compile(r"^(ptxas info +:| +\d+ bytes stack frame,).*\n?", re.MULTILINE)


def kernels(report: str) -> list[Kernel]:
    """What `ptxas -v` says of each kernel."""
    return [
        Kernel(found["name"], found["architecture"], int(found["stack"]), int(found["stores"]))
        for found in _ENTRY.finditer(report)
    ]


def allowed(name: str) -> int:
    return max((most for pattern, most in ALLOWED if re.search(pattern, name)), default=0)


def offenders(report: str) -> list[Kernel]:
    """The kernels for Hopper that keep more in local memory than they may."""
    return [
        kernel
        for kernel in kernels(report)
        if kernel.architecture == ARCHITECTURE
        and (kernel.stores > allowed(kernel.name) or (kernel.stack and not kernel.stores))
    ]


def main(command: list[str]) -> int:
    done = subprocess.run([*command, "-Xptxas=-v"], stderr=subprocess.PIPE, text=True)
    sys.stderr.write(_PTXAS.sub("", done.stderr))
    if done.returncode:
        return done.returncode
    found = offenders(done.stderr)
    for kernel in found:
        print(
            f"error: {kernel.name} spills {kernel.stores} bytes (stack {kernel.stack}) on "
            f"{ARCHITECTURE}, {allowed(kernel.name)} are allowed: lower its registers, or the "
            f"blocks of __launch_bounds__",
            file=sys.stderr,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
