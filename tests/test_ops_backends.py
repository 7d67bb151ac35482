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
from subzero_kernels import backends, ops, plans
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
    speed = {
        "fold_": {
            "bfloat16 large rank 64": 1.25,
            "float32 large rank 64": 0.8,
            "float16 large rank 64": 1.03,
        }
    }
    monkeypatch.setattr(
        backends,
        "load",
        lambda name: (None, f"no {name}") if name in missing else (Native, f"{name} is there"),
    )
    monkeypatch.setattr(backends, "measured", lambda: {"on": "some GPU", "triton_speed": speed})
    monkeypatch.setenv(backends.VARIABLE, "auto")
    backends._choose.cache_clear()
    yield missing
    backends._choose.cache_clear()


def test_auto_takes_the_faster_backend_for_the_kind_of_call(measured):
    fast = backends.choose("fold_", "cuda", kind="bfloat16 large rank 64")
    where = "large rank 64, some GPU)"
    assert fast.backend == "triton"
    assert fast.reason == f"1.25 times as fast as cuda (bfloat16 {where}; triton is there"
    slow = backends.choose("fold_", "cuda", kind="float32 large rank 64")
    assert slow.backend == "cuda"
    assert slow.reason == f"1.25 times as fast as triton (float32 {where}; cuda is there"
    even = backends.choose("fold_", "cuda", kind="float16 large rank 64")
    assert even.backend == "cuda"
    assert even.reason == f"within 3% of triton (float16 {where}; cuda is there"


@pytest.mark.parametrize("kind", ["", "bfloat16 small rank 64", "bfloat16 large rank 128"])
def test_auto_prefers_cuda_where_nothing_was_measured(measured, kind):
    choice = backends.choose("fold_", "cuda", kind=kind)
    assert (choice.backend, choice.reason) == ("cuda", "cuda is there")


def test_auto_takes_the_other_backend_where_the_faster_one_is_missing(measured):
    measured.add("triton")
    choice = backends.choose("fold_", "cuda", kind="bfloat16 large rank 64")
    assert (choice.backend, choice.reason) == ("cuda", "cuda is there")
    backends._choose.cache_clear()
    measured.add("cuda")
    choice = backends.choose("fold_", "cuda", kind="bfloat16 large rank 64")
    assert (choice.backend, choice.reason) == ("reference", "no triton; no cuda")
    backends._choose.cache_clear()
    measured.remove("triton")
    choice = backends.choose("fold_", "cuda", kind="float32 large rank 64")
    assert (choice.backend, choice.reason) == ("triton", "triton is there")


def test_what_was_measured_on_a_gpu_decides_nothing_on_the_cpu(measured):
    choice = backends.choose("fold_", "cpu", kind="bfloat16 large rank 64")
    assert (choice.backend, choice.reason) == ("cpu", "cpu is there")


def test_kinds_name_the_dtype_the_size_and_the_rank():
    assert backends.kind_of(torch.bfloat16, 1 << 20) == "bfloat16 large"
    assert backends.kind_of(torch.float32, (1 << 20) - 1) == "float32 small"
    ranks = {1: 16, 16: 16, 17: 32, 24: 32, 64: 64, 65: 128, 128: 128}
    for rank, kind in ranks.items():
        assert backends.kind_of(torch.float16, 5, rank) == f"float16 small rank {kind}"


def test_the_ops_say_what_kind_of_call_they_are(monkeypatch):
    asked = {}
    choose = backends.choose

    def noted(op, device, float64=False, kind=""):
        asked[op] = kind
        return choose(op, device, float64, kind)

    monkeypatch.setattr(ops, "choose", noted)
    monkeypatch.setattr(plans, "choose", noted)
    w, u, v = torch.zeros(40, 30, dtype=torch.bfloat16), torch.zeros(40, 20), torch.zeros(30, 20)
    coeff, rng = torch.ones(1), sk.make_rng(1)
    sk.normal_(w, rng, 2)
    sk.perturb_(w, u, v, coeff, rng, stream=2)
    sk.perturb_many_([w], [u], [v], coeff, rng, streams=[2])
    sk.fold_(w, u, v, torch.zeros(20, 20))
    sk.noise_outer_(
        torch.zeros(1024, 20), torch.ones(1, 1024), torch.zeros(1024, 20, dtype=torch.float16),
        torch.arange(1024), rng, stream=2,
    )  # fmt: skip
    sk.perturb_dense_([w], coeff, rng, streams=[2])
    assert asked == {
        "normal_": "bfloat16 small",
        "perturb_": "bfloat16 small rank 32",
        "perturb_many_": "bfloat16 small rank 32",
        "fold_": "bfloat16 small rank 32",
        "noise_outer_": "float16 large rank 32",
        "perturb_dense_": "bfloat16 small",
    }
    del asked["perturb_many_"]
    with torch.no_grad():
        sk.perturb_plan([w], [u], [v], [2]).perturb_(coeff, rng)
    assert asked["perturb_many_"] == "bfloat16 small rank 32"


def test_the_committed_measurements_can_be_read():
    """Ops and kinds that exist, and speeds that can be."""
    names = {str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16, torch.float16)}
    made = backends.measured()
    assert set(made) == {"on", "triton_speed"} and bool(made["on"]) == bool(made["triton_speed"])
    for op, speeds in made["triton_speed"].items():
        assert op in ops.OPS
        for kind, speed in speeds.items():
            dtype, size, *rank = kind.split()
            assert dtype in names and size in ("large", "small")
            assert rank in ([], *(["rank", str(1 << log)] for log in range(4, 10)))
            assert 0.01 < speed < 100


def test_reference_has_every_op():
    assert set(ops.OPS) == reference.OPS
    assert all(callable(getattr(reference, op)) for op in ops.OPS)
