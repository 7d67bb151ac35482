"""Seconds and memory of one step of each method, alone on the device.

python benchmarks/learning/seconds.py --model MODEL --data FOLDER --out seconds.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from methods import METHODS
from run import Bench

from subzero.batches import TrainBatches

WARM, TIMED = 4, 12


def main() -> None:
    """Measure on the same batches for all and write one row a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    bench = Bench(args.model, args.data, args.device)
    cuda = bench.encoder.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "cpu"
    rows = []
    for method, spec in METHODS.items():
        choice = spec.candidates(300, by_token=False)[-1]
        stepper = bench.stepper(dict(task="sst2", method=method, choice=choice, seed=0))
        source = iter(TrainBatches(bench.encoder, bench.data("sst2").train, stepper.batch, 0))
        stepper.align(source)
        stepper.set_lr(0.0)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times, costs = [], []
        for i in range(WARM + TIMED):
            batch = next(source)
            begin = time.perf_counter()
            loss, cost = stepper.step(batch)
            float(loss)
            if i >= WARM:
                times.append(time.perf_counter() - begin)
                costs.append(cost)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        row = dict(
            method=method, choice=choice, ms=round(1e3 * statistics.median(times), 2),
            cost=round(statistics.mean(costs), 3), peak_mib=round(peak / 2**20), device=name,
            torch=torch.__version__,
        )  # fmt: skip
        rows.append(row)
        print(row, flush=True)
        stepper.close()
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
