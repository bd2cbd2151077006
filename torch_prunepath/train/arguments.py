"""Making ``TrainingArguments`` and ``TrainConfig`` agree on the settings that both of them have."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transformers import TrainingArguments

from torch_prunepath.train.config import TrainConfig

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""The name that ``TrainingArguments`` has for each value of ``TrainConfig.decay``."""


def trainer_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments with which ``PrunePathTrainer`` trains as ``config`` says, for ``TrainingArguments``.

    Trainer's filter of infinite losses is switched off: it waits for the device in every step, and
    ``PrunePathTrainer`` stops at such a loss anyway.

    Example::

        config = recipes.ours(steps=1000)
        args = TrainingArguments("out", per_device_train_batch_size=8, **trainer_arguments(config))
        PrunePathTrainer(model, args, config=config, train_dataset=dataset).train()
    """
    length = {"max_steps": config.steps} if config.steps is not None else {"num_train_epochs": config.epochs}
    return {
        **length,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        "gradient_accumulation_steps": config.accumulation,
        "max_grad_norm": config.clip or 0.0,
        "lr_scheduler_type": SCHEDULERS[config.decay],
        "warmup_steps": min(config.warmup, 1 - 1e-9),  # below 1: a share of the steps
        "bf16": config.autocast,
        "seed": config.seed,
        "logging_nan_inf_filter": False,
    }


def as_said(config: TrainConfig, args: TrainingArguments) -> TrainConfig:
    """Return ``config`` with the values of ``args`` in the fields that both have.

    Raises:
        ValueError: if a field of the config is not at its default and differs from ``args``.
    """
    steps = args.max_steps if args.max_steps > 0 else None
    warmup = args.warmup_steps if args.warmup_steps < 1 else None if steps is None else args.warmup_steps / steps
    decays = {value: key for key, value in SCHEDULERS.items()} | {"constant": "constant"}
    said: dict[str, tuple[str, Any]] = {
        "steps": ("max_steps", steps),
        "epochs": ("num_train_epochs", None if steps is not None else args.num_train_epochs),
        "lr": ("learning_rate", args.learning_rate),
        "weight_decay": ("weight_decay", args.weight_decay),
        "accumulation": ("gradient_accumulation_steps", args.gradient_accumulation_steps),
        "clip": ("max_grad_norm", args.max_grad_norm or None),
        "decay": ("lr_scheduler_type", decays.get(str(getattr(args.lr_scheduler_type, "value", "")))),
        "warmup": ("warmup_steps", warmup),
        "autocast": ("bf16", args.bf16),
        "seed": ("seed", args.seed),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, (theirs, value) in said.items():
        mine = getattr(config, name)
        if mine != defaults[name] and not _same(mine, value):
            raise ValueError(
                f"TrainConfig says {name}={mine!r}, but TrainingArguments {theirs}={getattr(args, theirs)!r}: give "
                "TrainingArguments(**trainer_arguments(config), ...), or leave the field of TrainConfig at its default"
            )
    # A learning-rate schedule that TrainConfig has no word for is Trainer's alone.
    known: dict[str, Any] = {
        name: value for name, (_, value) in said.items() if value is not None or name in ("steps", "epochs")
    }
    return dataclasses.replace(config, **{**known, "clip": args.max_grad_norm or None})


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float) and isinstance(theirs, float | int):
        return math.isclose(mine, theirs, rel_tol=1e-6)
    return bool(mine == theirs)


def refuse(args: TrainingArguments, kwargs: dict[str, Any]) -> None:
    """Refuse arguments for things that ``PrunePathTrainer`` does not do.

    Raises:
        ValueError: if a ``model_init``, a loss function, label smoothing, ``torch_compile``,
            ``ddp_find_unused_parameters`` or DataParallel (several GPUs in one process) is asked for.
    """
    if kwargs.get("model_init") is not None or kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "PrunePathTrainer takes no model_init and no compute_loss_func: pass model=, and losses in config="
        )
    if args.label_smoothing_factor:
        raise ValueError("PrunePathTrainer does not smooth labels: leave label_smoothing_factor at 0")
    if args.torch_compile:
        raise ValueError("torch_compile compiles the model as a whole: pass compile=True to PrunePathTrainer instead")
    if args.ddp_find_unused_parameters:
        raise ValueError("routers have losses of their own, outside the model: leave ddp_find_unused_parameters unset")
    if args.n_gpu > 1:
        raise ValueError("DataParallel copies the model for each batch: run one process for each GPU, with torchrun")
