"""SubZero: zeroth-order fine-tuning of language models in random subspaces, forward passes only.

from subzero import SubZero
opt = SubZero(model, lr=1e-6, eps=1e-3, rank=64)
loss = opt.step(lambda: model(**batch).loss)
"""

from typing import TYPE_CHECKING, Any

from subzero_kernels import __version__

from .objectives import LogitsLoss, label_logits, label_words, next_token
from .optimizer import SubZero
from .plan import Plan

if TYPE_CHECKING:
    from .hf_trainer import SubZeroConfig, SubZeroTrainer

__all__ = [
    "LogitsLoss",
    "Plan",
    "SubZero",
    "SubZeroConfig",
    "SubZeroTrainer",
    "__version__",
    "label_logits",
    "label_words",
    "next_token",
]


def __getattr__(name: str) -> Any:
    """The Trainer on first use: the optimizer itself needs no transformers."""
    if name in ("SubZeroConfig", "SubZeroTrainer"):
        from . import hf_trainer

        return getattr(hf_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
