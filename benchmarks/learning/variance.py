"""Variance of one-sided gradient estimates of a linear layer: formula against simulation.

    python benchmarks/learning/variance.py [--repeats 4000] [--output benchmarks/results]

Linear losses l_b = g_b . W x_b of B examples (first order in eps, which then drops out), batch
gradient G = mean_b g_b x_b^T. Six estimates, each the mean of K queries of a one-sided step, which
costs K + 1 forwards of the batch whatever the estimate; V = E|estimate - G|^2, Q = mean_b
|g_b|^2 |x_b|^2, Q_R = mean of |G_n|^2 over groups n of R examples, G_n the group's mean gradient:

    noise        drawn           losses            V
    weight       for the batch   1 of the batch    (m n + 1) |G|^2 / K           (MeZO's estimate)
    weight       for an example  1 an example      (m n + 1) Q / (K B)
    activation   for the batch   1 an example      (m + 1) |G|^2 / K
    activation   for an example  1 for R examples  R (m Q + Q_R) / (K B)         R = 1, 4, B

Derived in docs/activation-noise.md, section 5, with Isserlis' theorem. The table here holds V in
units of |G|^2 and cosine = E<estimate, G> / sqrt(E|estimate|^2 |G|^2) = 1 / sqrt(1 + V / |G|^2).
All arithmetic is float64 on the CPU; seeds are fixed.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "activation_variance.csv"
CHUNK = 64  # repeats at a time: bounds the memory of one noise matrix for each query and example


class Setting(NamedTuple):
    """Sizes of the layer, the batch and the run."""

    m: int = 24
    n: int = 32
    examples: int = 8
    queries: int = 4
    rows: int = 4  # examples that share a loss in the middle case; divides examples
    repeats: int = 4000
    seed: int = 0


class Problem(NamedTuple):
    """Gradients at the output and inputs, one row an example: g (B, m), x (B, n)."""

    g: Tensor
    x: Tensor

    @property
    def gradient(self) -> Tensor:
        """G = mean_b g_b x_b^T, (m, n)."""
        return self.g.T @ self.x / len(self.g)


class Case(NamedTuple):
    """One estimate: its labels, its V / |G|^2, and a draw of `count` independent estimates."""

    noise: str
    drawn: str
    loss: str
    variance: Callable[[Problem, Setting], float]
    draw: Callable[[Problem, Setting, int, torch.Generator], Tensor]  # (count, m, n)


class Row(NamedTuple):
    """A line of the table; the standard errors are of the simulated means."""

    noise: str
    drawn: str
    loss: str
    variance: float
    variance_simulated: float
    variance_error: float
    cosine: float
    cosine_simulated: float
    cosine_error: float
    mean_simulated: float  # E<estimate, G> / |G|^2: 1 for an unbiased estimate
    mean_error: float

    def cells(self) -> list[str]:
        numbers = [f"{value:.4g}" for value in self[3:9]]
        return [self.noise, self.drawn, self.loss, *numbers]


HEADER = ["noise", "drawn for", "one loss for", "V", "simulated", "s.e."]
HEADER += ["cosine", "simulated cosine", "s.e. of cosine"]


def make_problem(setting: Setting) -> Problem:
    """Examples that agree in part and differ in size, as those of a batch of text do."""
    generator = torch.Generator().manual_seed(setting.seed)

    def rows(columns: int, agreement: float) -> Tensor:
        common = torch.randn(1, columns, dtype=torch.float64, generator=generator)
        own = torch.randn(setting.examples, columns, dtype=torch.float64, generator=generator)
        size = torch.randn(setting.examples, 1, dtype=torch.float64, generator=generator)
        return (0.3 * size).exp() * (agreement * common + math.sqrt(1 - agreement**2) * own)

    return Problem(g=rows(setting.m, 0.5), x=rows(setting.n, 0.7))


def square(t: Tensor) -> float:
    return t.square().sum().item()


def mean_square(problem: Problem, rows: int = 1) -> float:
    """Q_R: mean over groups of `rows` examples of |mean of g_b x_b^T|^2; Q for rows = 1."""
    g, x = (t.unflatten(0, (-1, rows)) for t in problem)
    return square(torch.einsum("nrm,nrc->nmc", g, x) / rows) / len(g)


def weight_shared_variance(problem: Problem, setting: Setting) -> float:
    """(m n + 1) / K: E|<G, Z> Z|^2 = (m n + 2) |G|^2."""
    return (setting.m * setting.n + 1) / setting.queries


def weight_own_variance(problem: Problem, setting: Setting) -> float:
    """(m n + 1) Q / (K B |G|^2): a sum of B independent terms <G_b, Z_b> Z_b / B."""
    ratio = mean_square(problem) / square(problem.gradient)
    return (setting.m * setting.n + 1) * ratio / (setting.queries * setting.examples)


def activation_shared_variance(problem: Problem, setting: Setting) -> float:
    """(m + 1) / K: the estimate is z z^T G, and E|z z^T G|^2 = (m + 2) |G|^2."""
    return (setting.m + 1) / setting.queries


def activation_own_variance(rows: int) -> Callable[[Problem, Setting], float]:
    """R (m Q + Q_R) / (K B |G|^2), R = rows examples to a loss."""

    def variance(problem: Problem, setting: Setting) -> float:
        total = setting.m * mean_square(problem) + mean_square(problem, rows)
        cost = setting.queries * setting.examples * square(problem.gradient)
        return rows * total / cost

    return variance


def normals(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def weight_shared(problem: Problem, setting: Setting, count: int, rng: torch.Generator) -> Tensor:
    """mean_k rho_k Z_k, rho_k = the change of the batch's mean loss."""
    z = normals(rng, count, setting.queries, setting.m, setting.n)
    moved = torch.einsum("tkmc,bc->tkbm", z, problem.x)
    rho = torch.einsum("tkbm,bm->tkb", moved, problem.g).mean(-1)
    return torch.einsum("tk,tkmc->tmc", rho, z) / setting.queries


def weight_own(problem: Problem, setting: Setting, count: int, rng: torch.Generator) -> Tensor:
    """mean_(k, b) rho_kb Z_kb, every example under weights of its own."""
    z = normals(rng, count, setting.queries, setting.examples, setting.m, setting.n)
    moved = (z * problem.x[:, None, :]).sum(-1)
    rho = (moved * problem.g).sum(-1)
    return torch.einsum("tkb,tkbmc->tmc", rho, z) / (setting.queries * setting.examples)


def activation_shared(
    problem: Problem, setting: Setting, count: int, rng: torch.Generator
) -> Tensor:
    """mean_(k, b) w_kb z_k (x_b / |x_b|)^T, w_kb = |x_b| g_b . z_k."""
    z = normals(rng, count, setting.queries, setting.m)
    length = problem.x.norm(dim=1)
    w = (z @ problem.g.T) * length
    credit = torch.einsum("tkb,bc->tkc", w, problem.x / length[:, None])
    return torch.einsum("tkm,tkc->tmc", z, credit) / (setting.queries * setting.examples)


def activation_own(rows: int) -> Callable[[Problem, Setting, int, torch.Generator], Tensor]:
    """mean_(k, n) w_kn sum_(b in n) z_kb (x_b / |x_b|)^T, n the groups of `rows` examples."""

    def draw(problem: Problem, setting: Setting, count: int, rng: torch.Generator) -> Tensor:
        z = normals(rng, count, setting.queries, setting.examples, setting.m)
        length = problem.x.norm(dim=1)
        change = (z * problem.g).sum(-1) * length
        loss = change.unflatten(-1, (-1, rows)).mean(-1)
        w = loss.repeat_interleave(rows, dim=-1)
        sums = torch.einsum("tkb,tkbm,bc->tmc", w, z, problem.x / length[:, None])
        return sums * rows / (setting.queries * setting.examples)

    return draw


def cases(setting: Setting) -> Iterator[Case]:
    """The six estimates of the table, in its order."""
    yield Case("weight", "batch", "batch", weight_shared_variance, weight_shared)
    yield Case("weight", "example", "example", weight_own_variance, weight_own)
    yield Case("activation", "batch", "example", activation_shared_variance, activation_shared)
    for rows in (1, setting.rows, setting.examples):
        loss = {1: "example", setting.examples: "batch"}.get(rows, f"{rows} examples")
        variance, draw = activation_own_variance(rows), activation_own(rows)
        yield Case("activation", "example", loss, variance, draw)


def mean_and_error(samples: Tensor) -> tuple[float, float]:
    return samples.mean().item(), (samples.std() / math.sqrt(len(samples))).item()


def measure(case: Case, problem: Problem, setting: Setting) -> Row:
    """Formula and simulation of one estimate."""
    rng = torch.Generator().manual_seed(setting.seed + 1)
    gradient, size = problem.gradient, square(problem.gradient)
    parts = []
    for start in range(0, setting.repeats, CHUNK):
        estimate = case.draw(problem, setting, min(CHUNK, setting.repeats - start), rng)
        along = (estimate * gradient).sum((1, 2)) / size
        error = (estimate - gradient).square().sum((1, 2)) / size
        parts.append(torch.stack([along, error, estimate.square().sum((1, 2)) / size]))
    along, error, length = torch.cat(parts, dim=1)

    variance = case.variance(problem, setting)
    cosine = (along.mean() / length.mean().sqrt()).item()
    # s.e. of a / sqrt(b) to first order: of the samples of cosine (a_i / a - b_i / (2 b))
    influence = cosine * (along / along.mean() - length / (2 * length.mean()))
    return Row(
        *case[:3],
        variance,
        *mean_and_error(error),
        1 / math.sqrt(1 + variance),
        cosine,
        mean_and_error(influence)[1],
        *mean_and_error(along),
    )


def table(setting: Setting) -> list[Row]:
    problem = make_problem(setting)
    return [measure(case, problem, setting) for case in cases(setting)]


def write(rows: list[Row], setting: Setting, path: Path) -> None:
    """One line a case: the table's cells, then the setting and torch's version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    version = str(torch.__version__).split("+")[0]
    with open(path, "w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*HEADER, *Setting._fields, "torch"])
        for row in rows:
            lines.writerow([*row.cells(), *setting, version])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=Setting().repeats)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()

    setting = Setting(repeats=args.repeats)
    problem = make_problem(setting)
    size = square(problem.gradient)
    print(f"{setting}, Q / |G|^2 = {mean_square(problem) / size:.4g}", end="")
    print(f", Q_{setting.rows} / |G|^2 = {mean_square(problem, setting.rows) / size:.4g}\n")
    rows = table(setting)
    for cells in [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]:
        print(f"| {' | '.join(cells)} |")
    for row in rows:
        away = abs(row.variance_simulated - row.variance) / row.variance_error
        if away > 4:
            raise SystemExit(f"{row.noise}, {row.drawn}: {away:.1f} standard errors from formula")
    path = args.output / NAME
    write(rows, setting, path)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
