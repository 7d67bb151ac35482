"""Which backend runs an op, what is said about it, and what importing the package costs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import subzero_kernels as sk
from subzero_kernels import backends, ops
from subzero_kernels.backends import reference

ROOT = Path(sk.__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process that finds the package under test."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=300,
    )


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-c", textwrap.dedent(code), **environment)


@pytest.fixture
def without_torch(tmp_path: Path) -> str:
    """An environment's PYTHONPATH in which `import torch` fails as if it were not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import importlib.abc, importlib.util, sys

            class Hide(importlib.abc.MetaPathFinder):
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "torch":
                        raise ModuleNotFoundError("No module named 'torch'", name="torch")

            sys.meta_path.insert(0, Hide())
            find = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
            """
        )
    )
    return os.pathsep.join((str(tmp_path), str(ROOT)))


def test_importing_touches_no_gpu_and_no_backend():
    done = run_code(
        """
        import sys, torch
        before = set(sys.modules)
        import subzero_kernels
        new = {name for name in set(sys.modules) - before if not name.startswith("torch")}
        assert not torch.cuda.is_initialized()
        assert "subzero_kernels._native" not in new
        assert "subzero_kernels.backends.reference" not in new
        assert not any(name.split(".")[0] in ("numpy", "triton", "scipy") for name in new), new
        print("fine")
        """
    )
    assert done.stdout == "fine\n", done.stderr


def test_importing_without_torch_says_what_to_install(without_torch):
    done = run_code("import subzero_kernels", PYTHONPATH=without_torch)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: subzero_kernels needs PyTorch 2.6 or newer: "
        "install it with `pip install torch`."
    )


def test_the_report_says_what_each_op_runs_on():
    done = run("-m", "subzero_kernels", SUBZERO_BACKEND="auto")
    assert done.returncode == 0 and done.stderr == ""
    assert torch.__version__ in done.stdout
    assert f"subzero-kernels {sk.__version__}" in done.stdout
    for op in ops.OPS:
        choice = backends._choose("auto", op, "cpu", False)
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [op])
        assert line.split()[1] == choice.backend
        assert line.endswith(choice.reason)
    for name in backends.NAMES:
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines())


def test_the_report_works_without_torch(without_torch):
    done = run("-m", "subzero_kernels", PYTHONPATH=without_torch)
    assert done.returncode == 0, done.stderr
    assert "PyTorch is missing: install version 2.6 or newer" in done.stdout


def test_the_report_shows_a_forced_backend_that_is_not_there():
    done = run("-m", "subzero_kernels", SUBZERO_BACKEND="triton")
    assert done.returncode == 0
    assert f"cannot run normal_: {why_not_triton()}" in done.stdout
    assert "SUBZERO_BACKEND: triton" in done.stdout


def test_the_report_shows_an_unknown_name():
    done = run("-m", "subzero_kernels", SUBZERO_BACKEND="gpu")
    assert done.returncode == 0
    assert "expected auto, cuda, triton, cpu, reference, got 'gpu'" in done.stdout


def why_not_triton() -> str:
    """Why it does not run normal_ on CPU tensors: not installed, no GPU, or the tensors' device."""
    return backends._usable("triton", "normal_", "cpu", False)[1]


def arguments() -> tuple[torch.Tensor, torch.Tensor, int]:
    return torch.zeros(4), sk.make_rng(1), 2


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        (
            "triton",
            RuntimeError,
            "SUBZERO_BACKEND=triton cannot run normal_: {why_not_triton}; "
            "set SUBZERO_BACKEND=auto or SUBZERO_BACKEND=reference",
        ),
        (
            "Reference",
            ValueError,
            "SUBZERO_BACKEND: expected auto, cuda, triton, cpu, reference, got 'Reference'; "
            "set it to one of these or unset it",
        ),
    ],
)
def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch, setting, kind, message):
    monkeypatch.setenv(backends.VARIABLE, setting)
    out, rng, stream = arguments()
    with pytest.raises(kind) as caught:
        sk.normal_(out, rng, stream)
    assert str(caught.value) == message.format(why_not_triton=why_not_triton())
    assert not out.any()


def test_cuda_forced_on_cpu_tensors_is_an_error(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    out, rng, stream = arguments()
    with pytest.raises(RuntimeError, match=r"^SUBZERO_BACKEND=cuda cannot run normal_: .+; set "):
        sk.normal_(out, rng, stream)
    assert not out.any()


def test_the_variable_is_read_at_each_call(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "reference")
    sk.normal_(*arguments())
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(RuntimeError):
        sk.normal_(*arguments())
    for default in ("", "auto"):
        monkeypatch.setenv(backends.VARIABLE, default)
        sk.normal_(*arguments())


def test_auto_falls_back_to_reference_and_says_why(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "auto")
    choice = backends.choose("perturb_", "cpu", float64=True)
    assert choice.backend == "reference" and choice.function is reference.perturb_
    missing = backends.choose("perturb_", "xpu")
    assert missing == (reference.perturb_, "reference", "no native backend takes xpu tensors")
    module, why = backends.load("cpu")
    native = backends.choose("perturb_", "cpu")
    assert native.backend == ("cpu" if module else "reference")
    assert native.reason == why


def test_float64_is_refused_by_a_forced_native_backend(monkeypatch):
    if backends.load("cpu")[0] is None:
        pytest.skip("the native module is not built here")
    monkeypatch.setenv(backends.VARIABLE, "cpu")
    out = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64 is taken by the reference backend only"):
        sk.normal_(out, sk.make_rng(1), 2)
    assert not out.any()


def test_a_backend_without_the_op_is_passed_over(monkeypatch):
    """A native backend may lag behind: auto then takes reference, a forced one says so."""

    class Partial:
        OPS = frozenset({"normal_"})
        normal_ = staticmethod(reference.normal_)

    monkeypatch.setattr(backends, "load", lambda name: (Partial, "built for this test"))
    backends._choose.cache_clear()
    try:
        assert backends._choose("auto", "normal_", "cpu", False).backend == "cpu"
        passed = backends._choose("auto", "fold_", "cpu", False)
        assert (passed.backend, passed.reason) == ("reference", "the cpu backend has no fold_")
        with pytest.raises(RuntimeError, match="cannot run fold_: the cpu backend has no fold_"):
            backends._choose("cpu", "fold_", "cpu", False)
        with pytest.raises(RuntimeError, match="takes cuda tensors, these are on cpu"):
            backends._choose("cuda", "normal_", "cpu", False)
    finally:
        backends._choose.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Two backends for GPUs that have all ops, and times of them; no GPU is needed."""

    class Native:
        OPS = reference.OPS

    for op in reference.OPS:
        setattr(Native, op, staticmethod(getattr(reference, op)))
    missing: set[str] = set()
    times = {
        "fold_": {
            "bfloat16 large": {"cuda": 10.0, "triton": 8.0},
            "float32 large": {"cuda": 8.0, "triton": 10.0},
            "float16 large": {"cuda": 10.0},
        }
    }
    monkeypatch.setattr(
        backends,
        "load",
        lambda name: (None, f"no {name}") if name in missing else (Native, f"{name} is there"),
    )
    monkeypatch.setattr(backends, "measured", lambda: {"on": "some GPU", "us": times})
    monkeypatch.setenv(backends.VARIABLE, "auto")
    backends._choose.cache_clear()
    yield missing
    backends._choose.cache_clear()


def test_auto_takes_the_faster_backend_for_the_kind_of_tensor(measured):
    fast = backends.choose("fold_", "cuda", kind="bfloat16 large")
    assert fast.backend == "triton"
    assert fast.reason == ("1.25 times as fast as cuda (bfloat16 large, some GPU); triton is there")
    assert backends.choose("fold_", "cuda", kind="float32 large").backend == "cuda"


@pytest.mark.parametrize("kind", ["", "bfloat16 small", "float16 large"])
def test_auto_prefers_cuda_where_not_both_were_measured(measured, kind):
    choice = backends.choose("fold_", "cuda", kind=kind)
    assert (choice.backend, choice.reason) == ("cuda", "cuda is there")


def test_auto_takes_the_other_backend_where_the_faster_one_is_missing(measured):
    measured.add("triton")
    choice = backends.choose("fold_", "cuda", kind="bfloat16 large")
    assert (choice.backend, choice.reason) == ("cuda", "cuda is there")
    backends._choose.cache_clear()
    measured.add("cuda")
    choice = backends.choose("fold_", "cuda", kind="bfloat16 large")
    assert (choice.backend, choice.reason) == ("reference", "no triton; no cuda")


def test_kinds_name_the_dtype_and_the_size():
    assert backends.kind_of(torch.bfloat16, True) == "bfloat16 large"
    assert backends.kind_of(torch.float32, False) == "float32 small"


def test_the_committed_measurements_can_be_read():
    """Ops, kinds and backends that exist, and positive times."""
    names = {str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16, torch.float16)}
    for op, kinds in backends.measured()["us"].items():
        assert op in ops.OPS
        for kind, times in kinds.items():
            dtype, size = kind.split()
            assert dtype in names and size in ("large", "small")
            assert set(times) == {"cuda", "triton"} and min(times.values()) > 0


def test_reference_has_every_op():
    assert set(ops.OPS) == reference.OPS
    assert all(callable(getattr(reference, op)) for op in ops.OPS)
