"""A recorded run that is killed again and again ends as one that was left alone, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import batch, build, per_example, same_bits

from subzero import SubZero
from subzero.trajectory import read

OPTIONS: dict[str, Any] = dict(
    lr=1e-2, eps=1e-2, rank=4, refresh_every=7, seed=11, rule="momentum", state_at_refresh="keep"
)


def run(path: Path, steps: int) -> None:
    """As a user's script would: go on where the file ends, or begin."""
    torch.set_num_threads(1)
    model = build("llama")
    opt = SubZero(model, **OPTIONS)
    if path.exists() and b"\n" in path.read_bytes():
        opt.replay(path, torn="drop")
        opt.record(path, resume=True)
    else:
        path.unlink(missing_ok=True)
        opt.record(path)
    while opt.steps < steps:
        opt.step(batch(seed=opt.steps), per_example(model))
    opt.detach()
    torch.save(model.state_dict(), f"{path}.pt")


def test_a_run_killed_20_times_ends_with_the_same_weights(tmp_path: Path) -> None:
    killed, alone, steps = tmp_path / "killed.jsonl", tmp_path / "alone.jsonl", 0
    moments = random.Random(0)
    context = multiprocessing.get_context("forkserver")  # children need not import torch again
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama"])
    for _ in range(20):
        begun = killed.stat().st_size if killed.exists() else 0
        child = context.Process(target=run, args=(killed, 10**9))
        child.start()
        patience = time.monotonic() + 60
        # it must get somewhere, and then dies at any moment
        while child.is_alive() and time.monotonic() < patience:
            if killed.exists() and killed.stat().st_size > begun:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        assert child.is_alive()
        child.kill()
        child.join()
        steps = read(killed, torn="drop").steps
    assert steps > 20
    steps += 3
    run(killed, steps)
    run(alone, steps)
    assert killed.read_bytes() == alone.read_bytes()
    model = build("llama")
    model.load_state_dict(torch.load(f"{killed}.pt", weights_only=True))
    assert same_bits(model, torch.load(f"{alone}.pt", weights_only=True))


def test_a_line_torn_at_any_byte_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "trajectory.jsonl"
    run(path, 8)
    data, last = path.read_bytes(), 0
    starts = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for last in [*range(starts[-6], starts[-4], 5), len(data)]:
        path.write_bytes(data[:last])
        run(path, 8)
        assert path.read_bytes() == data
