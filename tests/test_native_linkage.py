"""What the native module brings into a process, and what is said where it is missing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

native = pytest.importorskip("subzero_kernels._native", reason="the native module is not built")

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_no_second_openmp_runtime_joins_the_process():
    code = """
        import re, torch
        def runtimes():
            with open("/proc/self/maps") as maps:
                return set(re.findall(r"/\\S*lib(?:g|i|)omp[\\w.-]*\\.so[\\w.]*", maps.read()))
        torch.ones(1 << 20).sum()
        before = runtimes()
        assert before, "torch brings one"
        from subzero_kernels.backends import cpu
        from subzero_kernels.rng import make_rng
        assert cpu.available()[0]
        cpu.normal_(torch.empty(1 << 20), make_rng(1), 1)
        assert runtimes() == before, (before, runtimes())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@linux
def test_the_module_links_system_libraries_only():
    path = Path(native.__file__)
    needed = _needed(path.read_bytes())
    allowed = ("libstdc++.", "libgcc_s.", "libc.", "libm.", "libpthread.", "libdl.", "librt.")
    assert needed and all(lib.startswith((*allowed, "ld-linux", "libc++")) for lib in needed), (
        needed
    )


def _needed(elf: bytes) -> list[str]:
    """DT_NEEDED of a 64-bit little-endian ELF file."""
    assert elf[:6] == b"\x7fELF\x02\x01"

    def number(at: int, size: int) -> int:
        return int.from_bytes(elf[at : at + size], "little")

    table, size, count = number(0x28, 8), number(0x3A, 2), number(0x3C, 2)
    sections = [table + i * size for i in range(count)]
    dynamic = next(at for at in sections if number(at + 4, 4) == 6)
    strings = number(sections[number(dynamic + 0x28, 4)] + 0x18, 8)
    first, length = number(dynamic + 0x18, 8), number(dynamic + 0x20, 8)
    entries = [(number(at, 8), number(at + 8, 8)) for at in range(first, first + length, 16)]
    return [ctypes.string_at(elf[strings + value :]).decode() for tag, value in entries if tag == 1]


def test_the_module_exports_its_init_function_alone():
    library = ctypes.CDLL(native.__file__)
    assert hasattr(library, "PyInit__native")
    for hidden in ("_ZN7subzero3cpu7normal_ERKNS_6NormalERKNS_6LaunchE", "cudaGetDevice"):
        assert not hasattr(library, hidden)


@pytest.mark.skipif(os.name != "posix", reason="hides the module by a path of its own")
def test_without_the_module_the_backend_says_how_to_build_it(tmp_path):
    code = """
        import sys, importlib.abc
        class Hide(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "subzero_kernels._native":
                    raise ImportError("hidden")
        sys.meta_path.insert(0, Hide())
        import torch, subzero_kernels
        from subzero_kernels.backends import choose, cpu
        works, why = cpu.available()
        assert not works and "pip install" in why, why
        assert choose("normal_", "cpu").backend == "reference"
        try:
            cpu.normal_(torch.empty(4), subzero_kernels.make_rng(1), 1)
        except RuntimeError as error:
            assert "pip install" in str(error)
        else:
            raise SystemExit("no error")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
