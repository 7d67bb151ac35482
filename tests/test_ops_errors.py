"""Bad input: one error that names the argument, what was expected, what came and a remedy.

Nothing is written. The real and the fake call share the validation and so raise the same.
"""

from __future__ import annotations

import re

import pytest
import torch
from error_cases import BF16, CASES, F32, F64, G, M, N, R, good
from torch._subclasses.fake_tensor import FakeTensorMode

import subzero_kernels as sk


def tensors_of(arguments: dict) -> list[torch.Tensor]:
    found = []
    for value in arguments.values():
        found += [t for t in (value if isinstance(value, list) else [value])]
    return [t for t in found if isinstance(t, torch.Tensor) and t.device.type != "meta"]


def assert_refused(op: str, arguments: dict, kind: type[Exception], start: str) -> None:
    """The call raises this message, has all four parts, and has touched no argument."""
    before = [t.clone() for t in tensors_of(arguments)]
    with pytest.raises(kind) as caught:
        getattr(sk, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(start)
    assert re.fullmatch(r"[\w\[\]]+: expected .+, got .+; .+", message)
    after = tensors_of(arguments)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("op", "spoiled", "kind", "start"),
    CASES,
    ids=[f"{op}-{'+'.join(spoiled)}-{i}" for i, (op, spoiled, _, _) in enumerate(CASES)],
)
def test_bad_input_is_named_and_touches_nothing(target, op, spoiled, kind, start):
    if target.device != "cpu":
        pytest.skip("the validation does not depend on the device")
    assert_refused(op, good(op) | spoiled, kind, start)


@pytest.mark.parametrize(
    ("op", "spoiled", "kind", "start"),
    [case for case in CASES if case[0] != "perturb_plan" and "meta" not in case[3]],
)
def test_a_fake_call_raises_the_same_error(op, spoiled, kind, start):
    with FakeTensorMode() as mode:

        def fake(value):
            if isinstance(value, list):
                return [fake(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        with pytest.raises(kind) as caught:
            getattr(sk, op)(**{k: fake(v) for k, v in (good(op) | spoiled).items()})
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("op", [op for op in dir(sk) if op.endswith("_") and op[0] != "_"])
def test_good_arguments_are_accepted(op):
    """Each case above spoils arguments that work, so it fails for its own reason."""
    getattr(sk, op)(**good(op))


def shared(op: str) -> dict:
    """Arguments whose memory overlaps, and the message's start."""
    arguments = good(op)
    buffer = torch.randn(600)
    square = buffer[:240].view(M, N)
    if op == "normal_":
        memory = torch.zeros(4, dtype=torch.int64)
        arguments |= dict(out=memory.view(F32)[2:6], rng=memory[:2])
        return arguments
    if op in ("perturb_", "fold_"):
        arguments |= dict(w=square, u=buffer[230:278].view(M, R))
    if op in ("perturb_many_", "perturb_plan"):
        arguments |= dict(ws=[square, buffer[239:479].view(N, M)])
    if op == "perturb_dense_":
        arguments |= dict(ws=[square, square])
    if op == "add_noise_":
        # Between the two groups of y, then on the first row of the second.
        y = buffer.as_strided((G, M, N), (300, 20, 1))
        sk.add_noise_(**(arguments | dict(y=y, scale=buffer[260:284].view(G, M))))
        arguments |= dict(y=y, scale=buffer[280:304].view(G, M))
    if op == "noise_outer_":
        arguments |= dict(out=square, a=buffer[239:339].view(5, N))
    if op == "core_noise_":
        arguments |= dict(base=[arguments["out"][0][0], arguments["base"][1]])
    return arguments


@pytest.mark.parametrize(
    ("op", "start"),
    [
        ("normal_", "out: expected memory of its own, got an overlap with rng; "),
        ("perturb_", "w: expected memory of its own, got an overlap with u; pass u.clone()"),
        ("perturb_many_", "ws[0]: expected memory of its own, got an overlap with ws[1]; "),
        ("perturb_plan", "ws[0]: expected memory of its own, got an overlap with ws[1]; "),
        ("perturb_dense_", "ws[0]: expected memory of its own, got an overlap with ws[1]; "),
        ("core_noise_", "out[0]: expected memory of its own, got an overlap with base[0]; "),
        ("fold_", "w: expected memory of its own, got an overlap with u; "),
        ("add_noise_", "y: expected memory of its own, got an overlap with scale; "),
        ("noise_outer_", "out: expected memory of its own, got an overlap with a; "),
    ],
)
def test_shared_memory_is_refused(op, start):
    assert_refused(op, shared(op), ValueError, start)


def test_shared_memory_is_refused_for_fake_tensors_too():
    with FakeTensorMode():
        buffer = torch.empty(600)
        u, v = torch.empty(M, R), torch.empty(N, R)
        coeff, rng = torch.empty(1), torch.empty(2, dtype=torch.int64)
        ws = [buffer[:240].view(M, N), buffer[239:479].view(M, N)]
        with pytest.raises(ValueError, match="expected memory of its own"):
            sk.perturb_many_(ws, [u, u], [v, v], coeff, rng, streams=[1, 2])
        ws = [buffer[:240].view(M, N), buffer[240:480].view(M, N)]
        sk.perturb_many_(ws, [u, u], [v, v], coeff, rng, streams=[1, 2])
        columns = torch.empty(M, 2 * N)
        parts = [columns[:, :N], columns[:, N:]]
        sk.perturb_many_(parts, [u, u], [v, v], coeff, rng, streams=[1, 2])


def test_core_noise_shares_memory_only_for_one_group_and_exactly():
    base = torch.zeros(2, R, R)
    rng, one = sk.make_rng(1), torch.ones(1, 1)
    sk.core_noise_([base[:1]], [base[0]], one, rng, streams=[1], mu=[1.0])
    assert base[0].abs().max() > 0
    kept = base.clone()
    shifted = torch.zeros(3 * R * R)
    cases = [
        ([base], [base[0]], torch.ones(2, 1)),
        ([shifted[4 : 4 + R * R].view(1, R, R)], [shifted[: R * R].view(R, R)], one),
    ]
    for out, start, coeff in cases:
        with pytest.raises(ValueError, match=r"out\[0\]: expected memory of its own"):
            sk.core_noise_(out, start, coeff, rng, streams=[1], mu=[1.0])
    with pytest.raises(ValueError, match=r"out\[0\]: .* overlap with base\[1\]"):
        swapped = [base[1], base[0]]
        sk.core_noise_([base[:1], base[1:]], swapped, one, rng, streams=[1, 2], mu=[1.0, 1.0])
    assert torch.equal(base, kept) and not shifted.any()


GRAD_CASES = [
    ("normal_", "out"),
    ("perturb_", "w"),
    ("perturb_", "u"),
    ("perturb_many_", "ws"),
    ("perturb_plan", "ws"),
    ("perturb_dense_", "ws"),
    ("core_noise_", "base"),
    ("fold_", "core"),
    ("add_noise_", "y"),
    ("add_noise_", "scale"),
    ("noise_outer_", "out"),
    ("noise_outer_", "a"),
    ("lowrank_linear", "x"),
    ("lowrank_linear", "bias"),
    ("lowrank_embedding", "w"),
    ("grouped_norm", "weight"),
]


@pytest.mark.parametrize(("op", "name"), GRAD_CASES)
def test_gradients_are_refused_in_grad_mode_only(op, name):
    arguments = good(op)
    value = arguments[name]
    tensor = value[0] if isinstance(value, list) else value
    tensor.requires_grad_()
    shown = f"{name}[0]" if isinstance(value, list) else name
    assert_refused(
        op,
        arguments,
        ValueError,
        f"{shown}: expected no gradient (zeroth-order ops have none), got requires_grad=True "
        "with grad mode on; call the op under torch.no_grad()",
    )
    with torch.no_grad():
        getattr(sk, op)(**arguments)
    with torch.inference_mode():
        getattr(sk, op)(**arguments)


def test_a_plan_refuses_gradients_at_its_call_too():
    arguments = good("perturb_plan")
    parameter = arguments["ws"][0].requires_grad_()
    with torch.no_grad():
        plan = sk.perturb_plan(**arguments)
        plan.perturb_(torch.tensor([0.1]), sk.make_rng(1))
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match=r"^ws\[0\]: expected no gradient"):
        plan.perturb_(torch.tensor([0.1]), sk.make_rng(1))
    assert torch.equal(parameter, before)


def test_a_plan_refuses_what_changed_since_it_was_made():
    arguments = good("perturb_plan")
    plan = sk.perturb_plan(**arguments)
    coeff, rng = torch.tensor([0.1]), sk.make_rng(1)
    plan.perturb_(coeff, rng)
    before = [w.clone() for w in arguments["ws"]]
    spoiled = [
        (dict(coeff=torch.zeros(0)), ValueError, "coeff: expected (K,) "),
        (dict(coeff=torch.zeros(1, dtype=F64)), TypeError, "coeff: expected float32"),
        (dict(rng=torch.zeros(1, dtype=torch.int64)), ValueError, "rng: expected (2,) "),
        (dict(rounding="up"), ValueError, "rounding: expected "),
        (dict(coeff=arguments["ws"][0][0, :1]), ValueError, "ws[0]: expected memory of its own"),
    ]
    for change, kind, start in spoiled:
        with torch.no_grad(), pytest.raises(kind) as caught:
            plan.perturb_(**(dict(coeff=coeff, rng=rng) | change))
        assert str(caught.value).startswith(start)
    assert all(torch.equal(a, b) for a, b in zip(arguments["ws"], before, strict=True))
    arguments["ws"][1].data = arguments["ws"][1].to(BF16)
    with pytest.raises(ValueError) as caught:
        plan.perturb_(coeff, rng)
    assert str(caught.value) == (
        "plan: expected the tensors it was made for, got one that has moved or was cast since; "
        "make a new perturb_plan"
    )
    assert torch.equal(arguments["ws"][0], before[0])
