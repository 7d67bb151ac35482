"""A plain PyTorch loop with SubZero: no backward(), no zero_grad(), a scheduler of torch's.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from subzero import SubZero


def main(steps: int = 200) -> tuple[float, float]:
    """Fit a small network to points on a circle; returns the loss before and after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    points = torch.randn(256, 2)
    labels = (points.norm(dim=1) > 1.2).long()

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(points), labels)

    opt = SubZero(model, lr=2e-2, rank=2, queries=8, rule="norm", refresh_every=20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    before = loss().item()
    for _ in range(steps):
        opt.step(loss)
        schedule.step()
    opt.detach()  # the weights take up what was learnt: a plain model again
    return before, loss().item()


if __name__ == "__main__":
    before, after = main()
    print(f"loss before {before:.3f}, after {after:.3f}")
