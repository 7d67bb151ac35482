"""What bench_step.py and bench_activation_step.py are asked alike."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gpu_bench import RESULTS, machine
from step_models import Tokens

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", nargs="+", type=Tokens.parse, metavar="16x32", help="examples x length")
    add("--rank", type=int)
    add("--layers", type=int, help="so many layers of the model only")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--padded", action="store_true", help="pad the first example, and pass a mask")
    add("--repeats", type=int, default=5, help="measurements, of which the median is taken")
    add("--least-ms", type=float, default=150.0, help="a measurement lasts so long or longer")
    add("--profile", action="store_true", help="a table of kernels: captured step against bare")
    add("--output", type=Path, help="CSV; default benchmarks/results/, by GPU and what is run")
    add("--device", default="cuda", help="cpu: whether the script works")


def output_of(options: argparse.Namespace, name: str, part: object) -> Path:
    """Where the table goes; ``part``: whether less than all was asked for."""
    if options.output is not None:
        return options.output
    gpu = machine()["gpu"].lower().replace("nvidia", "").split()[0]
    kind = "_part" if part else "_quick" if options.quick else ""
    return RESULTS / f"{name}_{gpu}{kind}.csv"
