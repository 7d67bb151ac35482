"""``transformers.Trainer`` with SubZero in the place of backward pass and optimizer.

Trainer's loop stays: data, schedulers, callbacks, evaluation, saving. ``training_step`` collects
the micro-batches of one update and makes the SubZero step on the last, under one perturbation.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.models.auto import modeling_auto as auto

from .objectives import LogitsLoss, next_token
from .optimizer import SubZero

STATE_FILE = "subzero.safetensors"  # tensors; counters, options and scheduler as JSON beside them
TEXT_INPUTS = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "labels",
    "decoder_input_ids", "decoder_attention_mask",
}  # fmt: skip
CLASSIFIERS = frozenset(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
MOST_GRAPHS = 32  # shapes captured in a run; batches of further shapes run eagerly


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SubZeroConfig(TrainingArguments):
    """``TrainingArguments`` with the options of :class:`subzero.SubZero`.

    ``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are
    Trainer's own fields. There are no gradients, hence none to clip: ``max_grad_norm`` is 0.
    ``gradient_accumulation_steps`` micro-batches are evaluated under the same perturbation.
    With ``bf16`` or ``fp16`` the model itself is converted, and saved so; what SubZero learns is
    kept in fp32 beside it. No autocast and no loss scaling, which are for gradients.

    Raises:
        ValueError: max_grad_norm other than 0.
    """

    learning_rate: float = _option(1e-6, "Learning rate of SubZero.")
    lr_scheduler_type: SchedulerType | str = _option("constant", "Schedule of the learning rate.")
    max_grad_norm: float = _option(0.0, "Must be 0: there is no gradient to clip.")
    noise: str = _option("weight", "weight, or activation for noise in outputs of linears.")
    eps: float = _option(1e-3, "Size of a perturbation; at least 1e-3 for 16-bit weights.")
    rank: int = _option(64, "Rank of the subspace of each matrix.")
    refresh_every: int = _option(1000, "Steps until the subspaces are chosen anew.")
    queries: int = _option(1, "Perturbations a step.")
    sides: str = _option("auto", "two, one, or auto.")
    rule: str = _option("sgd", "sgd, momentum, adam, norm, or muon.")
    apply: str = _option("forward", "forward (weights are read-only in a window) or in_place.")
    form: str = _option("right", "Of activation noise: right, core, or full.")
    credit: str = _option("block", "Of activation noise: block or own.")
    where: str = _option("loss", "Of activation noise: loss or all; all for classifiers.")
    discount: float = _option(0.0, "Of activation noise: credit for later tokens' losses, 0 to 1.")
    momentum: float = _option(0.9, "Of rules momentum and muon.")
    state_at_refresh: str = _option("reset", "reset or keep the rule's state.")
    fold_rounding: str = _option("auto", "nearest, stochastic, or auto (by dtype).")
    reshape: str = _option("auto", "none, square, grouped, or auto.")
    noise_seed: int | None = _option(None, "Of bases and noise; Trainer's seed if not given.")
    capture: bool = _option(True, "Capture steps as CUDA graphs where shapes allow.")

    def __post_init__(self) -> None:
        if self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm: expected 0, got {self.max_grad_norm}; SubZero has no gradient to "
                "clip, leave it out"
            )
        super().__post_init__()
        self.mixed_precision = "no"  # weights are of that dtype: nothing to cast in each forward

    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of :class:`subzero.SubZero`."""
        own = {f.name for f in fields(SubZeroConfig)} - {f.name for f in fields(TrainingArguments)}
        options = {name: getattr(self, name) for name in own - {"noise_seed", "capture"}}
        return options | {
            "lr": self.learning_rate,
            "seed": self.seed if self.noise_seed is None else self.noise_seed,
            "betas": (self.adam_beta1, self.adam_beta2),
            "adam_eps": self.adam_epsilon,
            "weight_decay": self.weight_decay,
        }


class _TrainerSubZero(SubZero):
    """Trainer calls ``step()`` after ``training_step``, which has made the step."""

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if closure is None:
            return None
        return super().step(closure, *args, **kwargs)


class SubZeroTrainer(Trainer):
    """``transformers.Trainer`` that trains with forward passes only.

    Takes Trainer's arguments but ``optimizers``, with a :class:`SubZeroConfig` as ``args``, and:

    Args:
        objective: what to minimise instead of the model's own loss: a ``LogitsLoss``, or
            ``objective(batch)`` -> losses (examples,) or (examples, tokens).
        score: what to maximise instead, differentiable or not: ``score(model, inputs)`` -> a
            number, such as the F1 of what ``model.generate`` answers. Weight noise only.

    Without either, causal language models, encoder-decoders and sequence classifiers with their
    own loss evaluate all signs and queries in one forward, captured as a CUDA graph for each
    shape that comes twice; anything else, ``compute_loss`` of a subclass or ``compute_loss_func``
    included, is called once for each sign of each query. Saved checkpoints hold the tuned weights
    for plain transformers, and the optimizer's state as safetensors.

    Raises:
        TypeError, ValueError: arguments that do not go together, several processes or devices.
    """

    args: Any  # a SubZeroConfig
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: SubZeroConfig | None = None,
        *more: Any,
        objective: LogitsLoss | Callable[[Any], Tensor] | None = None,
        score: Callable[[nn.Module, Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, SubZeroConfig):
            raise TypeError(
                f"args: expected a SubZeroConfig, got {type(args).__name__}; it takes what "
                "TrainingArguments takes"
            )
        if any(kwargs.get("optimizers", ())) or kwargs.get("optimizer_cls_and_kwargs"):
            raise ValueError("optimizers: expected none with SubZeroTrainer, which makes its own")
        if objective is not None and score is not None:
            raise ValueError("objective, score: expected at most one, got both")
        if score is not None and args.noise == "activation":
            raise ValueError(
                "score: expected noise='weight', got 'activation', which needs a loss per example; "
                "pass objective instead"
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"args: expected one process and device, got {max(args.world_size, args.n_gpu)}; "
                "start one process with one device in CUDA_VISIBLE_DEVICES"
            )
        super().__init__(model, args, *more, **kwargs)
        self.objective: Any = objective
        self.score: Any = score
        self._subzero: SubZero | None = None
        self._micros: list[Any] = []
        self._seen: set[Any] = set()
        self._captured: dict[Any, Any] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SubZero on the parameters with requires_grad."""
        if self.optimizer is None:
            self._seen, self._captured = set(), {}
            options = self.args.optimizer_options()
            model = self.model if model is None else model
            if self.args.bf16 or self.args.fp16:
                model.to(torch.bfloat16 if self.args.bf16 else torch.float16)
            classifier = type(model).__name__ in CLASSIFIERS
            if classifier and self.objective is None and options["noise"] == "activation":
                options["where"] = "all"  # its loss names no tokens: it may pool any of them
            self._subzero = _TrainerSubZero(model, **options)
            self.optimizer = self._subzero
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; afterwards the model's parameters hold the tuned weights."""
        self._micros = []
        result = super().train(*args, **kwargs)
        assert self._subzero is not None
        self._subzero.fold()
        return result

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Collect a micro-batch; on the last of an update make the step and return its loss."""
        self._micros.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micros, self._micros = self._micros, []
        assert self._subzero is not None
        objective = self.objective or self._own_objective(micros)
        if objective is not None:
            return self._batched_step(micros, objective).to(self.args.device)
        if self._subzero.options.activation:
            raise ValueError(
                "objective: expected one with noise='activation' and a loss of your own, got none; "
                "pass objective=, or use noise='weight'"
            )
        loss = self._subzero.step(lambda: self._loss(model, micros, num_items_in_batch))
        return loss.to(self.args.device)

    def _loss(self, model: nn.Module, micros: list[Any], items: Any) -> Any:
        """The scalar of one evaluation: Trainer's loss, or the score with its sign changed."""
        if self.score is not None:
            scores: list[Any] = [float(self.score(self.model, m)) for m in micros]
            return -sum(scores) / len(micros)
        own = self.compute_loss_func is not None  # such a loss divides by items itself
        with self.compute_loss_context_manager():
            # copies: label smoothing and subclasses take labels out of the batch
            losses: list[Any] = [
                self.compute_loss(model, dict(m), num_items_in_batch=items if own else None)
                for m in micros
            ]
        if own and items is not None:
            return sum(losses)
        # A mean of each micro-batch, weighted with what it is a mean of. Not Trainer's own sum of
        # losses over items: models that take that number without using it would count twice.
        sizes = [self._get_num_items_in_batch([m], self.args.device) for m in micros]
        weight = [1 if n is None else n for n in sizes]
        return sum(x * n for x, n in zip(losses, weight, strict=True)) / sum(weight)

    def _batched_step(self, micros: list[Any], objective: Any) -> Tensor:
        opt = self._subzero
        assert opt is not None
        if not self.args.capture or self.args.device.type != "cuda":
            return opt.step(micros, objective)
        key = tuple(
            (name, tuple(value.shape), value.dtype)
            for micro in micros
            for name, value in sorted(micro.items())
            if isinstance(value, Tensor)
        )
        if key in self._seen and key not in self._captured and len(self._captured) < MOST_GRAPHS:
            try:
                self._captured[key] = opt.capture([_widest(m) for m in micros], objective)
            except RuntimeError as error:
                warnings.warn(
                    f"SubZeroTrainer: steps run without CUDA graphs: {error}", stacklevel=2
                )
                self.args.capture = False
        self._seen.add(key)
        run = self._captured.get(key)
        return run(micros) if run is not None else opt.step(micros, objective)

    def _own_objective(self, micros: list[Any]) -> Any:
        """The model's own loss for each token or example, or None where it is not known."""
        plain = (
            self.score is None
            and type(self).compute_loss is Trainer.compute_loss
            and self.compute_loss_func is None
            and self.label_smoother is None
            and all(isinstance(m, Mapping) and set(m) <= TEXT_INPUTS for m in micros)
            and all(isinstance(m.get("labels"), Tensor) for m in micros)
        )
        model = self.model
        if not plain or getattr(model.config, "output_router_logits", False):
            return None
        if hasattr(model, "peft_config"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                return None  # tokens of the prompt stand before those of the batch
            model = model.get_base_model()
        name = type(model).__name__
        if name in CLASSIFIERS:
            return self._classes if model.config.num_labels > 1 else None
        causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        to_text = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        return next_token() if name in causal or name in to_text else None

    def _classes(self, batch: Any) -> Tensor:
        """Cross entropy of each example, (examples,), as the model's own loss averages it."""
        assert self._subzero is not None
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = self._subzero.model(**inputs).logits.float()
        if batch["labels"].is_floating_point():  # several classes at once
            losses = F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none")
            return losses.mean(-1)
        return F.cross_entropy(logits, batch["labels"].view(-1), reduction="none")

    # The state is tensors, numbers and strings: safetensors, written beside and renamed.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        assert self._subzero is not None
        state = self._subzero.state_dict()
        tensors = {name: t.cpu().contiguous() for name, t in state.pop("tensors").items()}
        state["scheduler"] = self.lr_scheduler.state_dict()
        path = os.path.join(output_dir, STATE_FILE)
        save_file(tensors, path + ".new", metadata={"subzero": json.dumps(state)})
        os.replace(path + ".new", path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"resume_from_checkpoint: expected {STATE_FILE} in {checkpoint}, got none; resume "
                "from a checkpoint of SubZeroTrainer that was saved without save_only_model"
            )
        with safe_open(path, framework="pt", device=str(self.args.device)) as file:
            state = json.loads(file.metadata()["subzero"])
            state["tensors"] = {name: file.get_tensor(name) for name in file.keys()}
        for group in state["param_groups"]:
            group["betas"] = tuple(group["betas"])
        self.lr_scheduler.load_state_dict(state.pop("scheduler"))
        self.optimizer.load_state_dict(state)


def _widest(batch: Any) -> Any:
    """The batch with as many labelled tokens as its shape can have: what a graph must hold."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return batch
    full = {name: torch.ones_like(batch[name]) for name in batch if name == "attention_mask"}
    return {**batch, **full, "labels": torch.ones_like(labels)}
