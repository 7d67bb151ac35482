"""A window of form right as a PEFT LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .activation_weights import ActivationWeights
from .checkpoint import fill_folder, reason

if TYPE_CHECKING:
    from .optimizer import SubZero


def export_lora(opt: SubZero, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors: lora_B = B, lora_A = V^T, scale 1."""
    weights = opt._weights
    if not isinstance(weights, ActivationWeights) or weights.plan.form != "right":
        raise ValueError(
            "export_lora: expected noise='activation' with form='right', got "
            f"noise={opt.options.noise!r}, form={opt.options.form!r}; fold and save the model"
        )
    if not weights.aligned:
        raise ValueError("export_lora: expected at least one step or bases_from, got none")
    if hasattr(opt.model, "peft_config"):
        raise ValueError(
            "export_lora: expected a model without an adapter, got one from peft; "
            "merge_and_unload() it before building SubZero"
        )
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    names = []
    transposed = False
    for tap, b in zip(weights.taps, weights.space.views(weights.space.value), strict=True):
        name = tap.credit.name.removesuffix(".weight")
        names.append(name)
        transposed |= tap.credit.transposed
        assert tap.basis is not None
        # fp32 as the state is: peft keeps adapters wider than 16-bit weights
        a = tap.basis.T.to(b.dtype)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().clone()
    rank = opt.options.rank
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=names,
        fan_in_fan_out=transposed, inference_mode=True, task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(getattr(opt.model, "config", None), "_name_or_path", None),
    )  # fmt: skip

    def write(partial: Path) -> None:
        config.save_pretrained(str(partial))
        save_file(tensors, partial / "adapter_model.safetensors")

    try:
        fill_folder(folder, write, overwrite=True)
    except Exception as error:
        raise OSError(
            f"export_lora: the adapter could not be written to {folder.absolute()}: "
            f"{reason(error)}; what was there is as before"
        ) from error
