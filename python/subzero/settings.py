"""Every choice of a training run, with its default; what config.json records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """One run of ``subzero train``. The defaults are the recipe of the README.

    Rule "norm" divides by the spread of the losses, so that lr and eps carry over between models
    and tasks far better than with plain SGD.
    """

    model: str
    output: str
    # task and data
    task: str | None = None
    data: str | None = None
    data_split: str = "train"
    template: str | None = None
    label_words: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    train_examples: int = 1000
    dev_examples: int = 200
    test_examples: int = 500
    split_seed: int = 0
    max_tokens: int = 256
    # model
    train_layers: str = "upper"
    train_embeddings: bool = False
    train_norms: bool = False
    dtype: str = "float32"
    device: str = "auto"
    # training
    steps: int = 60
    batch_size: int = 16
    eval_every: int = 10
    schedule: str = "cosine"
    seed: int = 0
    max_minutes: float | None = None
    # optimizer
    lr: float = 3e-2
    eps: float = 1e-3
    rank: int = 16
    queries: int = 8
    sides: str = "one"
    rule: str = "norm"
    apply: str = "forward"
    refresh_every: int = 1000
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    state_at_refresh: str = "reset"
    fold_rounding: str = "auto"
    reshape: str = "auto"
    # output
    overwrite: bool = False
