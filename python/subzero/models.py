"""Causal language models from a hub id, a local folder or a GGUF file, and what to train."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .credit import RESIDUAL_WRITERS
from .errors import CommandError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model in eval mode on its device, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    label: str


def load_model(name: str, dtype: str = "float32", device: str = "auto") -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: Hugging Face id, local folder, GGUF file, or folder with one GGUF file.
        dtype: "float32", "bfloat16" or "float16", of the weights.
        device: "auto" (a GPU if there is one), or a torch device.

    Raises:
        CommandError: nothing there, no causal language model, no tokenizer, an unusable device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Its bars for each file of weights would stand among the lines of the run.
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise CommandError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    where = _device(device)
    path = Path(name).expanduser()
    label = name
    gguf = _gguf_file(path)
    source = str(path) if path.exists() else name
    if gguf is not None:
        source = str(_plain_copy(gguf, dtype))
        label = f"{gguf.stem.rsplit('.', 1)[0]}, dequantised {gguf.stem.rsplit('.', 1)[-1]}"
    elif path.exists() and not (path / "config.json").is_file():
        raise CommandError(
            f"model: expected a folder with config.json or one *.gguf file, got {name!r} without"
        )
    elif not path.exists() and _looks_like_path(name):
        raise CommandError(f"model: no such folder or file: {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CommandError(f"model: cannot load {name!r}: {_first_line(error)}") from error
    model.eval().requires_grad_(False)
    model.to(where)
    return Loaded(model, tokenizer, label)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device: cannot use {name!r}: {_first_line(error)}") from error
    return device


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/"))


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        if path.suffix != ".gguf":
            raise CommandError(f"model: expected a folder, a .gguf file or an id, got file {path}")
        return path
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise CommandError(
                f"model: {path} holds several GGUF files ({names}); name one of them"
            )
        return files[0] if files else None
    return None


def cache_folder() -> Path:
    """Where plain copies of GGUF models are kept: $SUBZERO_CACHE, or ~/.cache/subzero."""
    return Path(os.environ.get("SUBZERO_CACHE") or Path.home() / ".cache" / "subzero")


def _plain_copy(gguf: Path, dtype: str) -> Path:
    """The GGUF dequantised to a folder of safetensors; made once, since it takes a while."""
    stat = gguf.stat()
    key = f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{dtype}"
    final = cache_folder() / f"{gguf.stem}-{dtype}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (final / "config.json").is_file():
        return final
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Without dequantize the weights may stay packed on a GPU, out of reach of an optimizer.
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=DTYPES[dtype],
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
    except Exception as error:  # a damaged GGUF raises whatever its parser stumbles over
        raise CommandError(f"model: cannot read {gguf}: {_first_line(error)}") from error
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=final.parent))
    except OSError as error:
        raise CommandError(
            f"model: cannot write the plain copy of {gguf.name} to {final.parent}: "
            f"{error.strerror}; set SUBZERO_CACHE to another folder",
            code=1,
        ) from error
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not final.exists():
            partial.rename(final)
    except Exception as error:  # OSError, or safetensors' own
        if not (final / "config.json").is_file():
            raise CommandError(
                f"model: cannot write the plain copy of {gguf.name} to {final.parent}: "
                f"{_first_line(error)}; free some space or set SUBZERO_CACHE to another folder",
                code=1,
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def choose_trained(
    model: nn.Module,
    layers: str = "upper",
    embeddings: bool = False,
    norms: bool = False,
    modules: str = "all",
) -> str:
    """Set requires_grad on what is to be trained, and say what that is.

    Args:
        layers: "all", "upper" (the upper half), "none", or numbers and ranges: "15-29", "0,4-7".
        embeddings: also matrices outside the blocks (embeddings, head).
        norms: also parameters of one dimension (norm weights, biases).
        modules: which matrices of the blocks: "all", "residual" (those whose output is added to the
            residual stream), or names of their modules: "o_proj,down_proj".

    Raises:
        CommandError: layers or modules the model does not have, nothing to train, no blocks found.
    """
    name, blocks = _blocks(model)
    chosen = parse_layers(layers, len(blocks))
    inside = {id(p) for block in blocks for p in block.parameters()}
    matrices = _matrices([blocks[i] for i in chosen], modules)
    model.requires_grad_(False)
    for p in [p for i in chosen for p in blocks[i].parameters()]:
        p.requires_grad_(id(p) in matrices if p.dim() > 1 else norms)
    for p in model.parameters():
        if id(p) not in inside:
            p.requires_grad_(embeddings if p.dim() > 1 else norms)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        raise CommandError(
            "--train-layers: nothing is left to train; choose layers or --train-embeddings"
        )
    total = sum(p.numel() for p in model.parameters())
    which = "" if modules == "all" else f" ({', '.join(sorted(set(matrices.values())))})"
    return f"{name} {_ranges(chosen)} of {len(blocks)}{which}: {count:,} of {total:,} parameters"


def _matrices(blocks: list[nn.Module], modules: str) -> dict[int, str]:
    """The matrices of blocks that ``modules`` names: id of the parameter -> name of its module."""
    found = {}
    for block in blocks:
        for path, p in block.named_parameters():
            if p.dim() > 1:
                found[id(p)] = path.rpartition(".")[0].rpartition(".")[2] or path
    if modules == "all" or not blocks:
        return found
    wanted = RESIDUAL_WRITERS
    if modules != "residual":
        wanted = frozenset(part.strip() for part in modules.split(","))
        unknown = sorted(wanted - set(found.values()))
        if unknown:
            raise CommandError(
                f"--train-modules: no module {unknown[0]!r} in these layers; expected all, "
                f"residual, or some of {', '.join(sorted(set(found.values())))}"
            )
    chosen = {key: leaf for key, leaf in found.items() if leaf in wanted}
    if not chosen:
        raise CommandError(
            "--train-modules: no module of these layers is known to write to the residual stream; "
            f"name some of {', '.join(sorted(set(found.values())))}, or take all"
        )
    return chosen


def parse_layers(text: str, count: int) -> list[int]:
    """Layer numbers, sorted, of "all", "upper", "none" or "0,4-7"."""
    named = {"all": range(count), "upper": range(count // 2, count), "none": range(0)}
    if text in named:
        return list(named[text])
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise CommandError(
                f"--train-layers: expected all, upper, none, or numbers like 0,4-7; got {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise CommandError(
                f"--train-layers: expected layers from 0 to {count - 1}, got {part.strip()!r}"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's longest list of blocks."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise CommandError("--train-layers: the model has no list of layers to choose from")
    return max(lists, key=lambda item: (len(item[1]), sum(p.numel() for p in item[1].parameters())))


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts) or "none"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
