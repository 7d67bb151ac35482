"""The ops as torch sees them: schemas, fakes, torch.compile without graph breaks or recompiles."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import subzero_kernels as sk
from subzero_kernels import ops

M, N, R, G = 12, 20, 4, 2


def case(op: str, device: str) -> tuple[tuple, dict]:
    """Arguments of an op on a device, the options that change its path switched on."""
    w, u, v = torch.randn(M, N), torch.randn(M, R), torch.randn(N, R)
    w, u, v = w.to(device), u.to(device), v.to(device)
    half = w.to(torch.bfloat16)
    coeff, rng = torch.tensor([0.1, 0.2], device=device), sk.make_rng(1, 2, device)
    core = torch.randn(G, R, R, device=device)
    stochastic = dict(rounding="stochastic")
    lists = ([half, torch.randn(N, M, device=device)], [u, v], [v, u])
    return {
        "philox4x32": ((torch.zeros(3, 4, dtype=torch.int64, device=device), rng), {}),
        "normal_": ((w, rng, 3), {}),
        "perturb_": ((half, u, v, coeff, rng), dict(stream=3, **stochastic)),
        "perturb_many_": ((*lists, coeff, rng), dict(streams=[3, 4])),
        "perturb_dense_": (([half, w[:, 3:7]], coeff, rng), dict(streams=[3, 4], **stochastic)),
        "core_noise_": (
            ([torch.zeros_like(core)], [core[0].clone()], torch.ones(G, 2, device=device), rng),
            dict(streams=[3], mu=[2.0]),
        ),
        "fold_": ((half, u, v, core[0]), dict(decay=0.9, rng=rng, stream=3, **stochastic)),
        "add_noise_": (
            (
                torch.zeros(G, M, N + 3, device=device)[:, :, 1:-2],
                torch.ones(G, M, device=device),
                torch.arange(G, device=device),
                torch.arange(M, device=device),
                rng,
            ),
            dict(stream=3),
        ),
        "noise_outer_": (
            (w, torch.ones(2, 3, device=device), w[:3] + 1, torch.arange(3, device=device), rng),
            dict(stream=3, beta=0.9),
        ),
        "lowrank_linear": (
            (torch.randn(2 * G, 3, N, device=device), w, torch.ones(M, device=device), u, v, core),
            {},
        ),
        "lowrank_embedding": ((torch.zeros(G, 3, dtype=torch.int64).to(device), w, u, v, core), {}),
        "grouped_norm": (
            (half[:4].view(4, 2, 10), torch.ones(G, 10, device=device), None, 1e-5, True),
            {},
        ),
    }[op]


@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(target, op):
    args, kwargs = case(op, target.device)
    opcheck(getattr(torch.ops.subzero, op).default, args, kwargs)


def test_opcheck_knows_each_public_op():
    public = {name for name in sk.__all__ if hasattr(ops, name)}
    assert set(ops.OPS) == public


def step(w, other, x, coeff, rng, stream):
    """All in-place ops and the side path, as one step of an optimizer uses them."""
    with torch.no_grad():
        u, v = torch.ones(M, R) / 4, torch.ones(N, R) / 5
        sk.perturb_(w, u, v, coeff, rng, stream=stream)
        sk.perturb_many_([w, other], [u, v], [v, u], coeff, rng, streams=[stream, stream + 1])
        sk.perturb_dense_([other], coeff, rng, streams=[stream])
        base = torch.zeros(R, R)
        sk.core_noise_([base[None]], [base], coeff[None], rng, streams=[stream], mu=[3.0])
        y = sk.lowrank_linear(x, w, None, u, v, base[None])
        sk.fold_(w, u, v, base, decay=0.5)
        noise = torch.empty(5)
        sk.normal_(noise, rng, stream)
        rows, ones = torch.arange(len(x)), torch.ones(1, len(x))
        noisy = y[None].clone()
        sk.add_noise_(noisy, ones, rows[:1], rows, rng, stream=stream)
        outer = torch.empty(M, N)
        sk.noise_outer_(outer, ones, x, rows, rng, stream=stream)
    return y, base, noise, noisy, outer


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_compiles_as_one_graph_and_computes_the_same(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    w, other, x = torch.randn(M, N), torch.randn(N, M), torch.randn(3, N)
    parameter = torch.nn.Parameter(w.clone())
    results = {}
    for name, function, target in (("eager", step, w), ("compiled", compiled, parameter)):
        second = other.clone()
        y = function(target, second, x, torch.tensor([0.1, 0.3]), sk.make_rng(1, 2), 5)
        results[name] = [target.detach(), second, *y]
    for eager, fast in zip(results["eager"], results["compiled"], strict=True):
        assert torch.equal(eager, fast)


def test_new_values_do_not_recompile():
    """Seeds, draws and coefficients are data; a stream becomes symbolic at its second value."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x = torch.randn(3, N)
    for i in range(6):
        if i == 3:
            settled = counter.frame_count
        w, other = torch.randn(M, N), torch.randn(N, M)
        stream = 7 if i < 2 else 7 + i
        compiled(w, other, x, torch.tensor([0.1, 0.1 * i]), sk.make_rng(i, i), stream)
        if i == 1:
            assert counter.frame_count == 1
    assert settled <= 2
    assert counter.frame_count == settled


def test_a_plan_compiles():
    torch._dynamo.reset()
    u, v = torch.randn(M, R), torch.randn(N, R)
    w, expected = torch.zeros(M, N), torch.zeros(M, N)
    plan = sk.perturb_plan([w], [u], [v], [3])
    run = torch.compile(lambda c, r: plan.perturb_(c, r), fullgraph=True, backend="aot_eager")
    for draw in range(2):
        run(torch.tensor([0.1]), sk.make_rng(1, draw))
        sk.perturb_(expected, u, v, torch.tensor([0.1]), sk.make_rng(1, draw), stream=3)
    assert torch.equal(w, expected) and w.any()


def test_bad_input_fails_while_tracing_with_the_ops_own_message():
    torch._dynamo.reset()
    compiled = torch.compile(sk.fold_, fullgraph=True, backend="aot_eager")
    w, u, v = torch.zeros(M, N), torch.zeros(M, R), torch.zeros(N, 3)
    with pytest.raises(Exception, match=r"u: expected \(12, 3\) for w \(12, 20\) at rank 3"):
        compiled(w, u, v, torch.zeros(R, R))


def test_fakes_promise_what_the_ops_return(target):
    """Shapes, dtypes and strides of the two ops that return something, for each weight dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (x, w, bias, u, v, core), _ = case("lowrank_linear", target.device)
        x, w = x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1), w.to(dtype)
        opcheck(
            torch.ops.subzero.lowrank_linear.default,
            (x, w, bias, u, v, core),
            test_utils="test_faketensor",
        )
        (ids, _, u, v, core), _ = case("lowrank_embedding", target.device)
        opcheck(
            torch.ops.subzero.lowrank_embedding.default,
            (ids.int(), w, u, v, core),
            test_utils="test_faketensor",
        )
