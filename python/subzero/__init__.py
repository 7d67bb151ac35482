"""SubZero: zeroth-order fine-tuning of language models in random subspaces, forward passes only.

from subzero import SubZero
opt = SubZero(model, lr=1e-6, eps=1e-3, rank=64)
loss = opt.step(lambda: model(**batch).loss)
"""

from subzero_kernels import __version__

from .objectives import LogitsLoss, label_logits, label_words, next_token
from .optimizer import SubZero
from .plan import Plan

__all__ = [
    "LogitsLoss",
    "Plan",
    "SubZero",
    "__version__",
    "label_logits",
    "label_words",
    "next_token",
]
