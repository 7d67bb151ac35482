"""A call on lists that was checked once is not checked again; no other call escapes the checks."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

import subzero_kernels as sk
from subzero_kernels import backends, known, ops, validate
from subzero_kernels.backends import reference

OPS = ["perturb_many_", "perturb_dense_", "core_noise_"]


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "auto")
    known.forget()
    yield
    known.forget()


def good(op: str) -> dict:
    """Arguments of two matrices: 6 x 4 at rank 2 in a buffer of 48, cores 2 x 2."""
    buffer = torch.zeros(60)
    coeff, streams = torch.tensor([0.5]), [3, 4]
    rng = sk.make_rng(1, 2, coeff.device)
    shared = dict(rng=rng, streams=streams)
    if op == "core_noise_":
        base = [torch.zeros(2, 2), torch.zeros(2, 2)]
        out = [torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)]
        return dict(out=out, base=base, coeff=coeff[None], mu=[1.0, 2.0], **shared)
    ws = [buffer[:24].view(6, 4), buffer[24:48].view(6, 4)]
    if op == "perturb_dense_":
        return dict(ws=ws, coeff=coeff, rounding="nearest", **shared)
    us, vs = [torch.ones(6, 2) for _ in ws], [torch.ones(4, 2) for _ in ws]
    return dict(ws=ws, us=us, vs=vs, coeff=coeff, rounding="nearest", **shared)


def written(arguments: dict) -> list[torch.Tensor]:
    return arguments["out" if "out" in arguments else "ws"]


@pytest.fixture
def checked(monkeypatch):
    """The ops whose tensors were checked in full since, by the pieces of the checks they share."""
    seen = []
    whole = validate.check_memory

    def noted(*args, **kwargs):
        seen.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(validate, "check_memory", noted)
    return seen


@pytest.mark.parametrize("op", OPS)
def test_a_call_is_checked_once_and_writes_the_same_bits_each_time(op, checked):
    arguments = good(op)
    first = [t.clone() for t in written(arguments)]
    getattr(sk, op)(**arguments)
    count = len(checked)
    assert count
    once = [t.clone() for t in written(arguments)]
    for t, start in zip(written(arguments), first, strict=True):
        t.copy_(start)
    getattr(sk, op)(**arguments)
    assert len(checked) == count
    assert all(map(torch.equal, written(arguments), once))
    # Other coefficients and another draw in memory of their own: still known, and other noise.
    for t, start in zip(written(arguments), first, strict=True):
        t.copy_(start)
    other = arguments | dict(coeff=2 * arguments["coeff"], rng=arguments["rng"].clone())
    getattr(sk, op)(**other)
    assert len(checked) == count
    assert all(torch.equal(t, 2 * o) for t, o in zip(written(arguments), once, strict=True))
    getattr(sk, op)(**(other | dict(rng=sk.make_rng(1, 3))))
    assert len(checked) == count
    assert not all(torch.equal(t, 2 * o) for t, o in zip(written(arguments), once, strict=True))


def changed(arguments: dict, name: str, index: int | None, value: object) -> dict:
    if index is None:
        return arguments | {name: value}
    items = list(arguments[name])
    items[index] = value(items[index]) if callable(value) else value
    return arguments | {name: items}


def view(*shape: int, offset: int = 0, strides: tuple[int, ...] | None = None):
    """A view of other shape on the memory of a tensor, so that its address may stay."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        steps = strides or torch.empty(shape).stride()
        return tensor.as_strided(shape, steps, tensor.storage_offset() + offset)

    return make


# What differs from a known call, and the exact type of the error: each at the known addresses.
FAULTS = [
    ("perturb_many_", "ws", 0, view(6, 3), ValueError),
    ("perturb_many_", "ws", 0, view(4, 6, strides=(1, 4)), ValueError),
    ("perturb_many_", "ws", 1, view(6, 4, strides=(0, 1)), ValueError),
    ("perturb_many_", "ws", 1, lambda t: t.view(torch.int32), TypeError),
    ("perturb_many_", "ws", 1, lambda t: t.to("meta"), ValueError),
    ("perturb_many_", "ws", 1, lambda t: view(6, 4, offset=-1)(t), ValueError),
    ("perturb_many_", "us", 0, view(5, 2), ValueError),
    ("perturb_many_", "us", 1, view(6, 1), ValueError),
    ("perturb_many_", "us", 1, lambda t: t.view(torch.int32), TypeError),
    ("perturb_many_", "vs", 0, view(2, 4), ValueError),
    ("perturb_many_", "vs", None, [], ValueError),
    ("perturb_many_", "streams", 1, 1 << 32, ValueError),
    ("perturb_many_", "streams", 0, -1, ValueError),
    ("perturb_many_", "streams", None, [3], ValueError),
    ("perturb_many_", "rounding", None, "up", ValueError),
    ("perturb_many_", "coeff", None, torch.zeros(0), ValueError),
    ("perturb_many_", "coeff", None, torch.zeros(1, 1), ValueError),
    ("perturb_many_", "coeff", None, torch.zeros(1, dtype=torch.float64), TypeError),
    ("perturb_many_", "coeff", None, torch.zeros(1, device="meta"), ValueError),
    ("perturb_many_", "rng", None, torch.zeros(2), TypeError),
    ("perturb_many_", "rng", None, torch.zeros(3, dtype=torch.int64), ValueError),
    ("perturb_many_", "rng", None, torch.zeros(4, dtype=torch.int64)[::2], ValueError),
    ("perturb_dense_", "ws", 0, view(4, 6, strides=(1, 4)), ValueError),
    ("perturb_dense_", "ws", 1, lambda t: view(6, 4, offset=-1)(t), ValueError),
    ("perturb_dense_", "ws", 1, lambda t: t.view(torch.int32), TypeError),
    ("perturb_dense_", "streams", 1, 1 << 32, ValueError),
    ("core_noise_", "out", 0, view(2, 2), ValueError),
    ("core_noise_", "base", 1, view(1, 1), ValueError),
    ("core_noise_", "base", 1, view(2, 2, strides=(1, 2)), ValueError),
    ("core_noise_", "coeff", None, torch.zeros(2, 1), ValueError),
    ("core_noise_", "mu", 1, math.nan, ValueError),
    ("core_noise_", "mu", None, [1.0], ValueError),
]


@pytest.mark.parametrize(("op", "name", "index", "value", "kind"), FAULTS)
def test_what_differs_from_a_known_call_is_refused_as_if_nothing_were_known(
    op, name, index, value, kind
):
    arguments = good(op)
    bad = changed(arguments, name, index, value)
    with pytest.raises(kind) as fresh:
        getattr(sk, op)(**bad)
    getattr(sk, op)(**arguments)
    before = [t.clone() for t in written(arguments)]
    with pytest.raises(kind) as after:
        getattr(sk, op)(**bad)
    assert str(after.value) == str(fresh.value)
    assert all(map(torch.equal, written(arguments), before))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["coeff", "rng"])
def test_coeff_and_rng_in_what_is_written_are_refused(op, name):
    arguments = good(op)
    getattr(sk, op)(**arguments)
    target = written(arguments)[1]
    inside = target.view(-1)[:1] if name == "coeff" else target.view(-1)[:4].view(torch.int64)
    if name == "coeff" and op == "core_noise_":
        inside = inside[None]
    with pytest.raises(ValueError, match=r"\[1\]: expected memory of its own, got an overlap"):
        getattr(sk, op)(**(arguments | {name: inside}))


def test_coeff_between_what_is_written_is_checked_in_full_and_taken(checked):
    """In the gap that column slices of one buffer leave, and right before and behind them."""
    buffer = torch.zeros(6, 12)
    ws = [buffer[1:5, :4], buffer[1:5, 8:]]
    rng = sk.make_rng(1, 2)
    sk.perturb_dense_(ws, torch.tensor([0.5]), rng, streams=[3, 4])
    once, count = [w.clone() for w in ws], len(checked)
    for place, full in ((buffer[2, 5:6], True), (buffer[0, 11:], False), (buffer[5, :1], False)):
        place.fill_(0.5)
        before = len(checked)
        sk.perturb_dense_([w.zero_() for w in ws], place, rng, streams=[3, 4])
        assert all(map(torch.equal, ws, once)) and (len(checked) > before) == full
        place.zero_()
    assert len(checked) == count + 1


def test_gradients_are_asked_for_at_each_call():
    arguments = good("perturb_many_")
    sk.perturb_many_(**arguments)
    arguments["us"][1].requires_grad_()
    with pytest.raises(ValueError, match=r"^us\[1\]: expected no gradient"):
        sk.perturb_many_(**arguments)
    with torch.no_grad():
        sk.perturb_many_(**arguments)
        sk.perturb_many_(**arguments)
    with pytest.raises(ValueError, match=r"^us\[1\]: expected no gradient"):
        sk.perturb_many_(**arguments)


def test_the_sign_of_a_zero_is_no_detail():
    """A call with mu = -0.0 must not be taken for one with 0.0."""
    coeff, rng = torch.ones(1), sk.make_rng(1)
    zero, minus = (
        known.facts_of("core_noise_", ([coeff], coeff, rng), dict(mu=[mu])) for mu in (0.0, -0.0)
    )
    assert zero is not None and minus is not None and zero != minus


def test_the_backend_is_chosen_at_each_call(monkeypatch):
    arguments, ran = good("perturb_many_"), []
    sk.perturb_many_(**arguments)
    sound = reference.perturb_many_

    def noted(*args, **kwargs):
        ran.append(1)
        sound(*args, **kwargs)

    monkeypatch.setattr(reference, "perturb_many_", noted)
    backends._choose.cache_clear()
    monkeypatch.setenv(backends.VARIABLE, "reference")
    sk.perturb_many_(**arguments)
    sk.perturb_many_(**arguments)
    backends._choose.cache_clear()
    assert len(ran) == 2


@pytest.mark.parametrize("op", OPS)
def test_no_tensor_is_kept_alive(op):
    arguments = good(op)
    getattr(sk, op)(**arguments)
    getattr(sk, op)(**arguments)
    assert len(known._known) == 1
    tensors = [t for value in arguments.values() if isinstance(value, list) for t in value]
    gone = [weakref.ref(t) for t in tensors if isinstance(t, torch.Tensor)]
    del arguments, tensors
    gc.collect()
    assert gone and not any(ref() is not None for ref in gone)


def test_only_the_calls_of_late_are_kept():
    kept = [good("perturb_dense_") for _ in range(3 * known._MOST)]
    for arguments in kept:
        sk.perturb_dense_(**arguments)
        assert 1 <= len(known._known) <= known._MOST


def test_what_the_checks_ask_more_of_is_never_known():
    """Subclasses, tensors without addresses and such on two devices."""

    class Other(torch.Tensor):
        pass

    coeff, rng, streams = torch.ones(1), sk.make_rng(1), dict(streams=[1])
    plain = torch.zeros(3)
    assert known.facts_of("op", ([plain], coeff, rng), streams) is not None
    strange = [plain.as_subclass(Other), plain.to_sparse(), plain.to("meta")]
    for tensor in strange:
        assert known.facts_of("op", ([tensor], coeff, rng), streams) is None
    meta = [t.to("meta") for t in (plain, coeff, rng)]
    assert known.facts_of("op", (meta[:1], *meta[1:]), streams) is None


def test_every_op_on_lists_is_known_again():
    schemas = {op: str(getattr(torch.ops.subzero, op).default._schema) for op in ops.OPS}
    assert sorted(op for op, schema in schemas.items() if "[] " in schema) == sorted(OPS)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_a_known_call_runs_on_other_streams_and_in_a_graph(op, backend, monkeypatch, checked):
    """With the bits of the first one, on the default stream, each time."""
    if backends.load(backend)[0] is None:
        pytest.skip(backends.load(backend)[1])
    monkeypatch.setenv(backends.VARIABLE, backend)
    torch.set_default_device("cuda")
    try:
        arguments = good(op)
        outputs = written(arguments)

        def again() -> None:
            getattr(sk, op)(**arguments)

        def zeroed() -> None:
            for t in outputs:
                t.zero_()

        again()
        once, count = [t.clone() for t in outputs], len(checked)
        side = torch.cuda.Stream()
        zeroed()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again()
        side.synchronize()
        assert all(map(torch.equal, outputs, once))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again()
        zeroed()
        graph.replay()
        assert all(map(torch.equal, outputs, once)) and len(checked) == count
        arguments["rng"][1] += 1  # the draw
        zeroed()
        graph.replay()
        assert not any(map(torch.equal, outputs, once))
    finally:
        torch.set_default_device(None)
