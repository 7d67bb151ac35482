"""Bad input: one error that names the argument, what was expected, what came and a remedy.

Nothing is written. The real and the fake call share the validation and so raise the same.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import subzero_kernels as sk

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

M, N, R, G = 12, 20, 4, 2


def matrix(rows: int, columns: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(rows, columns).to(dtype)


def good(op: str) -> dict:
    """Valid arguments of an op, by name; each case spoils one of them."""
    w, u, v = matrix(M, N), matrix(M, R), matrix(N, R)
    coeff, rng = torch.tensor([0.1, 0.2]), sk.make_rng(1, 2)
    cores = torch.randn(G, R, R)
    lists = dict(ws=[w, matrix(N, M)], us=[u, v.clone()], vs=[v, u.clone()])
    return {
        "philox4x32": dict(
            counter=torch.zeros(3, 4, dtype=torch.int64), key=torch.zeros(2, dtype=torch.int64)
        ),
        "normal_": dict(out=w, rng=rng, stream=3),
        "perturb_": dict(w=w, u=u, v=v, coeff=coeff, rng=rng, stream=3),
        "perturb_many_": dict(**lists, coeff=coeff, rng=rng, streams=[3, 4]),
        "perturb_plan": dict(**lists, streams=[3, 4]),
        "perturb_dense_": dict(ws=lists["ws"], coeff=coeff, rng=rng, streams=[3, 4]),
        "core_noise_": dict(
            out=[torch.randn(G, R, R), torch.randn(G, 3, 3)],
            base=[torch.randn(R, R), torch.randn(3, 3)],
            coeff=torch.randn(G, 2),
            rng=rng,
            streams=[3, 4],
            mu=[1.0, 2.0],
        ),
        "fold_": dict(w=w, u=u, v=v, core=cores[0].clone()),
        "add_noise_": dict(
            y=torch.randn(G, M, N),
            scale=torch.randn(G, M),
            query=torch.arange(G),
            rows=torch.arange(M),
            rng=rng,
            stream=3,
        ),
        "noise_outer_": dict(
            out=w, weight=torch.randn(2, 5), a=matrix(5, N), rows=torch.arange(5), rng=rng, stream=3
        ),
        "lowrank_linear": dict(
            x=torch.randn(2 * G, 3, N), w=w, bias=torch.randn(M), u=u, v=v, core=cores
        ),
        "lowrank_embedding": dict(ids=torch.randint(0, M, (2 * G,)), w=w, u=u, v=v, core=cores),
    }[op]


def first(items: list, replacement: torch.Tensor) -> list:
    return [replacement, *items[1:]]


# op, what is spoiled, the error, and how its message starts
CASES = [
    ("philox4x32", dict(counter=torch.zeros(3, 3, dtype=torch.int64)), ValueError,
     "counter: expected (N, 4), got (3, 3); "),
    ("philox4x32", dict(counter=torch.zeros(3, 4)), TypeError,
     "counter: expected int64, got float32; convert it with .to(torch.int64)"),
    ("philox4x32", dict(key=torch.zeros(3, dtype=torch.int64)), ValueError,
     "key: expected (2,), got (3,); "),
    ("normal_", dict(out=torch.zeros(3, dtype=torch.int32)), TypeError,
     "out: expected float32 or bfloat16 or float16 or float64, got int32; "),
    ("normal_", dict(out=torch.zeros(6)[::2]), ValueError,
     "out: expected a contiguous tensor or a matrix with contiguous rows, "
     "got shape (3,) with strides (2,); "),
    ("normal_", dict(stream=2**32), ValueError,
     "stream: expected 0 <= stream < 2**32, got 4294967296; build it with stream_id"),
    ("normal_", dict(rng=torch.zeros(3, dtype=torch.int64)), ValueError,
     "rng: expected (2,) holding [seed, draw], got (3,); build it with make_rng(seed, draw)"),
    ("perturb_", dict(u=matrix(M, 2)), ValueError,
     "u: expected (12, 4) for w (12, 20) at rank 4, got (12, 2); "
     "build it with orthonormal_basis(12, 4, ...)"),
    ("perturb_", dict(u=matrix(13, R)), ValueError,
     "u: expected (12, 4) for w (12, 20) at rank 4, got (13, 4); "),
    ("perturb_", dict(v=matrix(21, R)), ValueError,
     "v: expected (20, 4) for w (12, 20) at rank 4, got (21, 4); "),
    ("perturb_", dict(u=matrix(16, R), v=matrix(16, R)), ValueError,
     "u: expected (m', r) and v (n', r) with m' n' = 240 for w (12, 20), "
     "got (16, 4) and (16, 4); "),
    ("perturb_", dict(w=torch.randn(3, 4, 20), v=matrix(21, R)), ValueError,
     "u: expected (m', r) and v (n', r) with m' n' = 240 for w (3, 4, 20), "),
    ("perturb_", dict(u=matrix(15, R), v=matrix(16, 3)), ValueError,
     "u: expected (15, 3) for w (12, 20) at rank 3, got (15, 4); "),
    ("perturb_", dict(u=torch.randn(M)), ValueError, "u: expected (rows, rank), got (12,); "),
    ("perturb_", dict(u=matrix(M, 13), v=matrix(N, 13)), ValueError,
     "u: expected 1 <= rank <= 12 for w as (12, 20), got rank 13; use min(rank, 12, 20)"),
    ("perturb_", dict(u=matrix(M, 0), v=matrix(N, 0)), ValueError,
     "u: expected 1 <= rank <= 12 for w as (12, 20), got rank 0; "),
    ("perturb_", dict(u=matrix(M, R, BF16)), TypeError, "u: expected float32, got bfloat16; "),
    ("perturb_", dict(w=matrix(M, N, BF16), u=matrix(M, R, torch.float16)), TypeError,
     "u: expected bfloat16 or float32, got float16; "),
    ("perturb_", dict(w=matrix(N, M).T), ValueError,
     "w: expected a contiguous tensor or a matrix with contiguous rows, got shape (12, 20) "
     "with strides (1, 12); pass .contiguous(), or for a transposed weight its .T"),
    ("perturb_", dict(w=torch.randn(1, N).expand(M, N)), ValueError,
     "w: expected a contiguous tensor or a matrix with contiguous rows, got shape (12, 20) "
     "with strides (0, 1); "),
    ("perturb_", dict(w=torch.randn(60).as_strided((M, N), (3, 1))), ValueError,
     "w: expected a contiguous tensor or a matrix with contiguous rows, "),
    ("perturb_", dict(u=matrix(R, M).T), ValueError, "u: expected a contiguous tensor or "),
    ("perturb_", dict(coeff=torch.zeros(0)), ValueError,
     "coeff: expected (K,) with one fp32 number per query, K >= 1, got (0,); "),
    ("perturb_", dict(coeff=torch.tensor(0.1)), ValueError, "coeff: expected (K,) "),
    ("perturb_", dict(coeff=torch.zeros(2, dtype=F64)), TypeError,
     "coeff: expected float32, got float64; "),
    ("perturb_", dict(coeff=torch.zeros(4)[::2]), ValueError,
     "coeff: expected a contiguous tensor, got strides (2,); "),
    ("perturb_", dict(rng=torch.zeros(2)), TypeError, "rng: expected int64, got float32; "),
    ("perturb_", dict(rounding="up"), ValueError,
     "rounding: expected 'nearest' or 'stochastic', got 'up'; "),
    ("perturb_", dict(stream=-1), ValueError, "stream: expected 0 <= stream < 2**32, got -1; "),
    ("perturb_", dict(u=torch.zeros(M, R, device="meta")), ValueError,
     "u: expected device cpu as w, got meta; move it with .to('cpu')"),
    ("perturb_", dict(rng=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError,
     "rng: expected device cpu as w, got meta; "),
    ("perturb_many_", dict(us=[matrix(M, R)]), ValueError,
     "us: expected 2 entries, one per tensor of ws, got 1; pass lists of one length"),
    ("perturb_many_", dict(streams=[1]), ValueError, "streams: expected 2 entries, "),
    ("perturb_many_", dict(streams=[1, 2**33]), ValueError,
     "streams[1]: expected 0 <= stream < 2**32, got 8589934592; "),
    ("perturb_many_", dict(vs=[matrix(N, R), matrix(M, 3)]), ValueError,
     "us[1]: expected (20, 3) for ws[1] (20, 12) at rank 3, got (20, 4); "),
    ("perturb_plan", dict(vs=[matrix(N, R), matrix(M, 3)]), ValueError,
     "us[1]: expected (20, 3) for ws[1] (20, 12) at rank 3, got (20, 4); "),
    ("perturb_plan", dict(streams=[-1, 0]), ValueError, "streams[0]: expected 0 <= stream"),
    ("perturb_dense_", dict(ws=[torch.zeros(4, dtype=torch.int64)] * 2), TypeError,
     "ws[0]: expected float32 or bfloat16 or float16 or float64, got int64; "),
    ("perturb_dense_", dict(coeff=torch.zeros(2, 2)), ValueError, "coeff: expected (K,) "),
    ("perturb_dense_", dict(streams=[1, 2, 3]), ValueError, "streams: expected 2 entries, "),
    ("perturb_dense_", dict(ws=[torch.zeros(3, 3, 4)[:, :, :2]] * 2), ValueError,
     "ws[0]: expected a contiguous tensor or a matrix with contiguous rows, "),
    ("core_noise_", dict(coeff=torch.zeros(G)), ValueError,
     "coeff: expected (G, K), G groups and K queries, both >= 1, got (2,); pass coeff[None]"),
    ("core_noise_", dict(coeff=torch.zeros(G, 0)), ValueError, "coeff: expected (G, K), "),
    ("core_noise_", dict(coeff=torch.zeros(3, 2)), ValueError,
     "out[0]: expected (3, 4, 4) for coeff (3, K) and base[0] (4, 4), got (2, 4, 4); "),
    ("core_noise_", dict(mu=[1.0]), ValueError, "mu: expected 2 entries, "),
    ("core_noise_", dict(mu=[1.0, float("nan")]), ValueError,
     "mu[1]: expected a finite number, got nan; "),
    ("core_noise_", dict(base=[torch.zeros(R, 3), torch.zeros(3, 3)]), ValueError,
     "base[0]: expected (r, r) with r >= 1, got (4, 3); "),
    ("core_noise_", dict(base=[torch.zeros(R, R, dtype=BF16), torch.zeros(3, 3)]), TypeError,
     "base[0]: expected float32 or float64, got bfloat16; "),
    ("core_noise_", dict(base=[torch.randn(R, R).T, torch.zeros(3, 3)]), ValueError,
     "base[0]: expected a contiguous tensor, got strides (1, 4); "),
    ("fold_", dict(core=torch.randn(G, R, R)), ValueError,
     "core: expected (4, 4) for u and v of rank 4, got (2, 4, 4); "),
    ("fold_", dict(core=torch.randn(R, R, dtype=F64)), TypeError,
     "core: expected float32, got float64; "),
    ("fold_", dict(decay=float("inf")), ValueError, "decay: expected a finite number, got inf; "),
    ("fold_", dict(rounding="stochastic"), ValueError,
     "rng: expected [seed, folds so far] for rounding='stochastic', got None; "
     "pass make_rng(seed, folds)"),
    ("fold_", dict(u=matrix(M, 13), v=matrix(N, 13)), ValueError,
     "u: expected 1 <= rank <= 12 for w as (12, 20), got rank 13; "),
    ("lowrank_linear", dict(x=torch.randn(4, 19)), ValueError,
     "x: expected (rows, ..., 20) for w (12, 20), got (4, 19); "),
    ("lowrank_linear", dict(x=torch.randn(3, N)), ValueError,
     "x: expected a leading axis of 2 equal groups (core has 2), got (3, 20); "),
    ("lowrank_linear", dict(x=torch.randn(N)), ValueError, "x: expected (rows, ..., 20) "),
    ("lowrank_linear", dict(x=matrix(4, N, BF16)), TypeError,
     "x: expected float32, got bfloat16; convert it with .to(torch.float32)"),
    ("lowrank_linear", dict(core=torch.randn(R, R)), ValueError,
     "core: expected (G, 4, 4) with G >= 1 for u and v of rank 4, got (4, 4); pass core[None]"),
    ("lowrank_linear", dict(bias=torch.randn(13)), ValueError,
     "bias: expected (12,) or (2, 12) for w (12, 20), got (13,); "),
    ("lowrank_linear", dict(bias=torch.randn(3, M)), ValueError, "bias: expected (12,) or "),
    ("lowrank_linear", dict(bias=torch.randn(M).to(BF16)), TypeError,
     "bias: expected float32, got bfloat16; "),
    ("lowrank_linear", dict(u=matrix(15, R), v=matrix(16, R)), ValueError,
     "u: expected (12, 4) for w (12, 20) at rank 4, got (15, 4); "),
    ("lowrank_linear", dict(w=torch.randn(M, 2 * N)[:, ::2]), ValueError,
     "w: expected a contiguous tensor or a matrix with contiguous rows, "),
    ("lowrank_linear", dict(w=torch.randn(3, 4, 20)), ValueError,
     "w: expected (m, n), got (3, 4, 20); "),
    ("lowrank_embedding", dict(ids=torch.zeros(4)), TypeError,
     "ids: expected int64 or int32, got float32; "),
    ("lowrank_embedding", dict(ids=torch.zeros(3, dtype=torch.int64)), ValueError,
     "ids: expected a leading axis of 2 equal groups (core has 2), got (3,); "),
    ("lowrank_embedding", dict(w=matrix(N, M).T), ValueError, "w: expected a contiguous tensor "),
]  # fmt: skip


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
    ("lowrank_linear", "x"),
    ("lowrank_linear", "bias"),
    ("lowrank_embedding", "w"),
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
