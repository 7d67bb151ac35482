"""Ops for zeroth-order fine-tuning in random subspaces (SubZero, arXiv 2410.08989).

Importing costs no more than importing torch and does not touch a GPU. ``python -m subzero_kernels``
tells what was found and which backend each op runs on.
"""

import sys

__version__ = "0.1.0"

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    # `python -m subzero_kernels` imports this file before it can report that torch is missing.
    _reporting = sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv
    if error.name != "torch":
        raise
    if not _reporting:
        raise ImportError(
            "subzero_kernels needs PyTorch 2.6 or newer: install it with `pip install torch`."
        ) from None
else:
    from .ops import (
        add_noise_,
        core_noise_,
        fold_,
        grouped_norm,
        lowrank_embedding,
        lowrank_linear,
        noise_outer_,
        normal_,
        perturb_,
        perturb_dense_,
        perturb_many_,
        philox4x32,
    )
    from .plans import PerturbPlan, perturb_plan
    from .rng import (
        PURPOSE_ACTIVATION,
        PURPOSE_BASIS_U,
        PURPOSE_BASIS_V,
        PURPOSE_CORE,
        PURPOSE_DENSE,
        PURPOSE_ROUNDING,
        make_rng,
        orthonormal_basis,
        stream_id,
    )
    from .shapes import factor_shape

__all__ = [
    "PURPOSE_ACTIVATION",
    "PURPOSE_BASIS_U",
    "PURPOSE_BASIS_V",
    "PURPOSE_CORE",
    "PURPOSE_DENSE",
    "PURPOSE_ROUNDING",
    "PerturbPlan",
    "add_noise_",
    "core_noise_",
    "factor_shape",
    "fold_",
    "grouped_norm",
    "lowrank_embedding",
    "lowrank_linear",
    "make_rng",
    "noise_outer_",
    "normal_",
    "orthonormal_basis",
    "perturb_",
    "perturb_dense_",
    "perturb_many_",
    "perturb_plan",
    "philox4x32",
    "stream_id",
]
