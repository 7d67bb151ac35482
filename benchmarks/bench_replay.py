"""Time of replaying a trajectory over the matrices of a decoder: steps a second, no forwards.

python benchmarks/bench_replay.py [--quick] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import struct
import sys
import time
from pathlib import Path

import torch
from torch import nn

from subzero import SubZero
from subzero.trajectory import Recorder, read, replay

LAYERS, WIDTH = 40, 5120  # OPT-13B: 4 d x d, d x 4d, 4d x d, and their biases


def model(layers: int, width: int, device: str) -> nn.Module:
    """Weights alone, uninitialised but for a fill: replay reads none of their values."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    net = nn.Module()
    for i in range(layers):
        for j, (m, n) in enumerate(shapes):
            linear = nn.Linear(n, m, device="meta", dtype=torch.bfloat16).to_empty(device=device)
            for p in linear.parameters():
                p.data.fill_(0.01)
            net.add_module(f"{i}_{j}", linear)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers of width 256, 50 steps")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--csv", help="append the row to this file")
    parser.add_argument("--path", default="bench_replay.jsonl", help="trajectory, overwritten")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, width, steps = (2, 256, 50) if args.quick else (LAYERS, WIDTH, args.steps)
    opt = SubZero(model(layers, width, device), rank=64, refresh_every=1000)
    begin = time.perf_counter()
    Path(args.path).unlink(missing_ok=True)
    recorder = Recorder(opt, Path(args.path))
    hashing = time.perf_counter() - begin
    recorder.close()
    bits = [struct.pack(">f", x).hex() for x in (0.5, 1e-6)]
    with open(args.path, "a", encoding="ascii") as file:
        for step in range(steps):
            file.write(f'[{step},"{bits[0]}","{bits[1]}"]\n')
    begin = time.perf_counter()
    for _ in replay(opt, read(args.path)):
        pass
    opt.fold()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    row = [name, torch.__version__, layers, width, steps, f"{hashing:.2f}", f"{seconds:.2f}"]
    head = ["device", "torch", "layers", "width", "steps", "fingerprint_s", "replay_s"]
    for out in [sys.stdout, *([open(args.csv, "a")] if args.csv else [])]:
        csv.writer(out).writerows([head, row])


if __name__ == "__main__":
    main()
