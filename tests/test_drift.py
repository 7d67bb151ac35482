"""What the paper's in-place loop, +eps, -2 eps, +eps and no update, leaves on the weights."""

from __future__ import annotations

import pytest
import torch
from op_cases import factors, on

import subzero_kernels as sk

STEPS = 100
# Norm of the change over the norm of W after 100 steps, for weights of standard deviation 0.02 at
# eps 1e-3, as README.md has it for 1,000 steps; it grows as the square root of the steps.
DRIFT = {
    (torch.bfloat16, "nearest"): 0.039,
    (torch.bfloat16, "stochastic"): 0.061,
    (torch.float16, "nearest"): 0.0049,
    (torch.float16, "stochastic"): 0.0077,
    (torch.float32, "nearest"): 5.9e-7,
}


@pytest.mark.parametrize(("dtype", "rounding"), DRIFT)
def test_the_drift_of_the_in_place_loop_is_what_is_documented(target, dtype, rounding):
    w, u, v = on(
        target.device, (0.02 * torch.randn(128, 128)).to(dtype), *factors(128, 128, 8, dtype)
    )
    before = w.double()
    plan = sk.perturb_plan([w], [u], [v], [3])
    rng = sk.make_rng(1, 0, target.device)
    signs = [torch.tensor([c], device=target.device) for c in (1e-3, -2e-3, 1e-3)]
    with torch.no_grad():
        for _ in range(STEPS):
            for coeff in signs:
                plan.perturb_(coeff, rng, rounding)
            rng[1] += 1
    drift = ((w.double() - before).norm() / before.norm()).item()
    assert drift == pytest.approx(DRIFT[dtype, rounding], rel=0.1)
