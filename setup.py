"""Builds subzero_kernels/_native with CMake; everything else is in pyproject.toml.

Environment
    SUBZERO_BUILD_CUDA         auto (default): CUDA kernels where nvcc is found; 0: the CPU module
                               alone; 1: an error where nvcc is missing
    MAX_JOBS                   files compiled at once (default: one per core)
    NVCC_THREADS               architectures that nvcc compiles at once (default 1)
    CMAKE_CUDA_ARCHITECTURES   as CMake's variable, for example "90a-real;120"
    CMAKE_ARGS                 further arguments for CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_setting() -> str:
    setting = os.environ.get("SUBZERO_BUILD_CUDA", "") or "auto"
    if setting not in ("auto", "0", "1"):
        sys.exit(
            f"SUBZERO_BUILD_CUDA: expected auto, 0 or 1, got {setting!r}; set it to one of these"
        )
    if setting == "0":
        return setting
    named = os.environ.get("CUDACXX")
    default = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc"
    found = shutil.which(named) if named else shutil.which("nvcc") or shutil.which(default)
    if found:
        os.environ["CUDACXX"] = found
    elif setting == "1":
        sys.exit(
            "SUBZERO_BUILD_CUDA=1: expected nvcc on PATH, in CUDA_HOME or in CUDACXX, found none; "
            "install the CUDA toolkit or build with SUBZERO_BUILD_CUDA=0"
        )
    return setting if found else "0"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # CMake's cache remembers the Python and tools of an earlier (isolated) build: start afresh.
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        suffix = target.name.removeprefix("_native")
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPYTHON_MODULE_EXTENSION={suffix}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DSUBZERO_BUILD_CUDA={cuda_setting()}",
        ]
        architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
        if architectures:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        if os.environ.get("NVCC_THREADS"):
            configure.append(f"-DNVCC_THREADS={os.environ['NVCC_THREADS']}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        make = ["cmake", "--build", str(build)]
        if os.environ.get("MAX_JOBS"):
            make += ["--parallel", os.environ["MAX_JOBS"]]
        target.parent.mkdir(parents=True, exist_ok=True)
        for command in (configure, make):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit("cmake: expected on PATH, found none; run `pip install cmake ninja`")
            except subprocess.CalledProcessError as error:
                sys.exit(f"building _native failed: {shlex.join(command)} gave {error.returncode}")


setup(
    ext_modules=[Extension("subzero_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
