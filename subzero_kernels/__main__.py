"""``python -m subzero_kernels``: what was found, which backend each op runs on, and why."""

from __future__ import annotations

import os
import platform
from importlib import util

from . import __version__


def _backend_lines() -> list[str]:
    from . import backends

    lines = []
    for name in backends.NAMES:
        module, why = backends.load(name)
        lines.append(f"  {name:<10} {'yes' if module else 'no':<4} {why}")
    return lines


def _gpu_lines() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["  none that PyTorch can use"]
    return [
        f"  cuda:{i}  {torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]


def _choice_lines(device: str) -> list[str]:
    from . import backends, ops

    lines = []
    for op in ops.OPS:
        # A line for each backend that runs the op on one kind of tensors or another.
        seen: set[str] = set()
        for kind in (backends.kinds(op) if device == "cuda" else []) or [""]:
            try:
                choice = backends.choose(op, device, kind=kind)
                if choice.backend not in seen:
                    lines.append(f"  {op:<18} {choice.backend:<10} {choice.reason}")
                seen.add(choice.backend)
            except (RuntimeError, ValueError) as error:
                lines.append(f"  {op:<18} {'error':<10} {error}")
                break
    return lines


def report() -> str:
    """The report as text; it holds what can be said even where torch or the native module lacks."""
    lines = [
        f"subzero-kernels {__version__}",
        f"  Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPUs",
    ]
    if util.find_spec("torch") is None:
        return "\n".join(
            [
                *lines,
                "  PyTorch is missing: install version 2.6 or newer with `pip install torch`.",
                "  Until then the package cannot be imported and no op can run.",
            ]
        )
    import torch

    from . import backends

    setting = os.environ.get(backends.VARIABLE)
    lines += [
        f"  PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        "backends  (usable here, and why)",
        *_backend_lines(),
        "",
        "GPUs",
        *_gpu_lines(),
        "",
        f"{backends.VARIABLE}: {setting or 'not set, so auto'}",
        "",
        "ops on CPU tensors, and why",
        *_choice_lines("cpu"),
    ]
    if torch.cuda.is_available():
        lines += ["", "ops on CUDA tensors, and why", *_choice_lines("cuda")]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
