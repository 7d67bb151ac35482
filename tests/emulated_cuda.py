"""The CUDA low-rank kernels on a CPU, from their own source, without nvcc or a GPU.

g++ compiles lowrank_*.cu*, perturb.cu and fold.cu; tests/emulator has the few CUDA headers and
instructions that they use. Every thread of a block is a fiber there. Copies arrive as late as they
may, warps run in any order, shared memory begins as NaN, and a misaligned address, a bank conflict
of ldmatrix, a barrier that not all reach and a write behind shared memory are errors. What it does
not know: other races, kernels that overlap, and how fast anything is.
"""

from __future__ import annotations

import ctypes
import fcntl
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parents[1] / "csrc"
EMULATOR = Path(__file__).parent / "emulator"
LIBRARY = "emulated.so"
# As in CMakeLists.txt, the long ones first: dtype of W, and the highest rank.
KERNELS = [(weight, rank) for rank in (256, 128, 64, 32, 16) for weight in ("float", "f16", "bf16")]
SMALL_BLOCK = 99 << 10  # bytes of shared memory of a block on sm_86
LARGE_BLOCK = 227 << 10  # on sm_90

# Bits must not depend on the compiler, as in CMakeLists.txt.
FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -fno-math-errno -fno-strict-aliasing".split()
# Fibers jump from stack to stack; shared memory is thread-local, never initialized, and each
# library's own.
FLAGS += "-U_FORTIFY_SOURCE -fno-extern-tls-init -fno-gnu-unique".split()


def _by_reference(source: str) -> str:
    """Kernels that take their parameters by reference.

    nvcc notes their sizes beside each kernel and a launch copies them; g++ knows no such note.
    """
    parameters = r"const __grid_constant__ [^)]*(?=\) \{)"
    one = r"(?:const __grid_constant__ )?(\w+\*?) (\w+)(?=,|$)"
    return re.sub(parameters, lambda all: re.sub(one, r"\1 const& \2", all[0]), source)


class Sources:
    """A copy of csrc in `folder` that g++ takes: all of it, or with something changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cuda = folder / "csrc" / "cuda"
        shutil.copytree(CSRC, folder / "csrc")
        for path in self.cuda.glob("*.cu*"):
            path.write_text(_by_reference(path.read_text()))
        shutil.copy(EMULATOR / "instructions.cuh", self.cuda)

    def replace(self, file: str, old: str, new: str) -> None:
        """Where `old` is in the file, which is once."""
        text = (self.cuda / file).read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        (self.cuda / file).write_text(text.replace(old, new))

    def compile(self, path: Path, *defines: str) -> str:
        """The object file."""
        out = str(self.folder / ("_".join([path.stem, *defines]) + ".o"))
        include = [f"-I{at}" for at in (self.folder, EMULATOR, EMULATOR / "include")]
        define = [f"-D{name}" for name in defines]
        _run(["g++", *FLAGS, *include, *define, "-x", "c++", "-c", str(path), "-o", out])
        return out

    def kernels(self, weight: str, rank: int) -> str:
        path = self.cuda / "lowrank_kernels.cu"
        return self.compile(path, f"SUBZERO_WEIGHT={weight}", f"SUBZERO_RANK={rank}")


def build(folder: Path) -> Path:
    """The library of all kernels, and its objects beside it."""
    sources = Sources(folder)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(sources.kernels, *kernel) for kernel in KERNELS]
        hosts = [sources.cuda / f"{name}.cu" for name in ("lowrank_update", "perturb", "fold")]
        own = [EMULATOR / "block.cpp", EMULATOR / "api.cpp"]
        jobs += [pool.submit(sources.compile, path) for path in hosts + own]
        objects = [job.result() for job in jobs]
    return link(folder, objects)


def link(folder: Path, objects: Sequence[str]) -> Path:
    made = folder / "making.so"
    _run(["g++", "-shared", *objects, "-o", str(made)])
    return made.rename(folder / LIBRARY)


def build_once(folder: Path) -> Path:
    """`build` by whichever process comes first; the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / LIBRARY
        return library if library.exists() else build(folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


class _Matrix(ctypes.Structure):  # of csrc/lowrank.h, as are the others
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class _LowRank(ctypes.Structure):
    _fields_ = [("w", _Matrix), ("u", _Matrix), ("v", _Matrix), ("stream", ctypes.c_uint32)]


def _matrix(tensor: Tensor, rows: int, columns: int, stride: int) -> _Matrix:
    dtype = (torch.float32, torch.bfloat16, torch.float16).index(tensor.dtype)
    return _Matrix(tensor.data_ptr(), rows, columns, stride, dtype)


def _rows(tensor: Tensor) -> _Matrix:
    rows, columns = tensor.shape
    return _matrix(tensor, rows, columns, columns if rows == 1 else tensor.stride(0))


def _weight(w: Tensor) -> _Matrix:
    return _matrix(w, 1, w.numel(), w.numel()) if w.is_contiguous() else _rows(w)


Item = tuple[Tensor, Tensor, Tensor, int]  # W, U, V, stream


class Emulated:
    """The ops on CPU tensors, as a GPU with this many multiprocessors would run them."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.perturb_many.restype = ctypes.c_char_p
        self._library.fold.restype = ctypes.c_char_p

    def perturb_many_(
        self,
        items: Sequence[Item],
        coeff: Tensor,
        rng: Tensor,
        *,
        rounding: str = "nearest",
        processors: int = 3,
        block_bytes: int = LARGE_BLOCK,
    ) -> None:
        self._library.set_device(processors, block_bytes)
        error = self._library.perturb_many(
            self._items(items),
            ctypes.c_int64(len(items)),
            ctypes.c_void_p(coeff.data_ptr()),
            ctypes.c_int64(coeff.numel()),
            ctypes.c_void_p(rng.data_ptr()),
            int(rounding == "stochastic"),
        )
        _check(error)

    def fold_(
        self,
        item: Item,
        core: Tensor,
        rng: Tensor,
        *,
        decay: float = 1.0,
        rounding: str = "nearest",
        processors: int = 3,
        block_bytes: int = LARGE_BLOCK,
    ) -> None:
        self._library.set_device(processors, block_bytes)
        error = self._library.fold(
            self._items([item]),
            ctypes.c_void_p(core.data_ptr()),
            ctypes.c_double(decay),
            ctypes.c_void_p(rng.data_ptr()),
            int(rounding == "stochastic"),
        )
        _check(error)

    @staticmethod
    def _items(items: Sequence[Item]) -> ctypes.Array[_LowRank]:
        return (_LowRank * len(items))(
            *(_LowRank(_weight(w), _rows(u), _rows(v), stream) for w, u, v, stream in items)
        )


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
