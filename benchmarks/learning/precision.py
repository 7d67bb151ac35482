"""How well 16-bit models see activation noise: their coefficients w against an fp32 model's.

    python benchmarks/learning/precision.py --model MODEL --data FOLDER --out precision.csv

The same noise, batches and weights (those of the 16-bit model) in both; the correlation of the
K B differences of losses says what part of a 16-bit step is signal, for each eps.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import torch
from methods import METHODS, choose_trained
from run import Bench, device_name

from subzero import SubZero, label_words
from subzero.batches import TrainBatches
from subzero.tasks import word_ids

EPS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCHES = 2


def differences(
    model: torch.nn.Module, batches: list, objective: object, eps: float
) -> torch.Tensor:
    """Losses less the clean ones, (batches, K B): what the weights of a step are made of."""
    opt = SubZero(model, noise="activation", form="full", rule="norm", queries=32, eps=eps, lr=0.0)
    rng = torch.tensor([0, 0], device=opt._skipped.device)
    found = []
    with torch.no_grad():
        for batch in batches:
            micros = opt._queries.bind(batch, objective, None)
            opt._queries.evaluate(micros, objective, eps, rng)
            found.append(micros[0].differences.flatten())
    opt.detach()
    return torch.stack(found)


def main() -> None:
    """One row for each dtype and eps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    bench = Bench(args.model, args.data, args.device)
    data = bench.data("sst2")
    objective = label_words(word_ids(data.task, bench.loaded.tokenizer))
    source = iter(TrainBatches(bench.encoder, data.train, 16, 0))
    batches = [next(source) for _ in range(BATCHES)]
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(bench.model).to(dtype)
        wide = copy.deepcopy(narrow).float()
        for model in (narrow, wide):
            choose_trained(model, 0.5, METHODS["full-rows"].options["modules"])
        for eps in EPS:
            ours, exact = (differences(m, batches, objective, eps) for m in (narrow, wide))
            pairs = zip(ours.float(), exact, strict=True)
            together = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]
            row = dict(
                dtype=str(dtype).removeprefix("torch."), eps=eps,
                correlation=round(float(torch.stack(together).mean()), 4),
                std_fp32=float(f"{float(exact.std()):.3g}"), queries=32, batches=BATCHES,
                device=device_name(bench.encoder.device), torch=torch.__version__,
                date=time.strftime("%Y-%m-%d"),
            )  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
