"""What the options of ``prunepath train`` come to: a training configuration, and the experts to train."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from typing import Any

import torch

from torch_prunepath.commands.train.options import TrainOptions
from torch_prunepath.commands.train.source import Source
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.train.compiling import check_how
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.recipes import EXPERTS, RECIPES

DISTILLED = ("ours", "held")
"""Recipes that learn from the dense model unless they are asked not to: it is worth 2 to 6% of perplexity to them."""

ANY_BATCHES = 1000
"""Batches of the data that options are checked with, before it is known how many there are."""


def check(options: TrainOptions) -> None:
    """Refuse what does not fit before anything heavy runs.

    Raises:
        ValueError: if the recipe, a field or a setting is refused, the device is missing, or a text cannot be had.
    """
    if options.recipe not in RECIPES:
        raise UserError(f"--recipe {options.recipe!r} is not known: choose one of {', '.join(RECIPES)}")
    check_how(options.compile or False)
    if not _is_there(device_of(options)):
        raise UserError(f"--device {options.device}: this machine has none: leave it out, or give cpu")
    distil = distillation(options, dense=True)
    if options.teacher is not None and not distil:
        raise UserError("--teacher is only for --distil: give both, or none")
    source_of(options).check()
    if options.eval_text is not None:
        Source(options.eval_text).check()
    experts(options)
    training(options, ANY_BATCHES, distil)


def source_of(options: TrainOptions) -> Source:
    """What is trained on."""
    return Source(options.text, options.dataset, options.subset, options.split, options.text_column)


def device_of(options: TrainOptions) -> str:
    """The device that was named; or else CUDA if there is any, or the CPU."""
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def experts(options: TrainOptions) -> SparsifyConfig:
    """How a dense model is made sparse.

    Raises:
        ValueError: if a setting is refused.
    """
    base = dataclasses.replace(EXPERTS[options.recipe], seed=options.seed)
    return dataclasses.replace(base, **options.settings)


def distillation(options: TrainOptions, dense: bool) -> float:
    """Weight of the distillation: as asked, or 1 where a recipe of ``DISTILLED`` trains all weights.

    Args:
        options: the command's.
        dense: whether the dense model is at hand: MODEL is dense, or there is a teacher.
    """
    if options.distil is not None:
        return options.distil
    return 1.0 if dense and options.recipe in DISTILLED and not options.routers_only else 0.0


def training(options: TrainOptions, batches: int, distil: float) -> TrainConfig:
    """How the model is trained.

    Args:
        options: the command's.
        batches: how many batches one pass over the data has.
        distil: weight of the distillation.

    Raises:
        ValueError: if a field is not known or a value is refused.
    """
    recipe = RECIPES[options.recipe]
    parameters = inspect.signature(recipe).parameters
    rates = {name: getattr(options, name) for name in ("lr", "router_lr")}
    fields = {name: value for name, value in rates.items() if value is not None}
    fields |= dict(_parse(field) for field in options.fields)
    if not fields.keys().isdisjoint(("distil", "distill_logits")):
        raise UserError("distillation needs the dense model: give --distil WEIGHT in place of --set")
    steps = _steps(options, batches)
    known = {"steps": steps, "epochs": options.epochs or 1.0, "sparsity": options.target_sparsity}
    given = {name: value for name, value in (known | fields).items() if name in parameters}
    changes = {name: value for name, value in fields.items() if name not in parameters}
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"steps", "epochs", "phases"}
    unknown = sorted(changes.keys() - names)
    if unknown:
        choices = ", ".join(sorted(names | set(parameters)))
        raise UserError(f"--set {unknown[0]} is no field of the recipe or of TrainConfig: choose from {choices}")
    changes |= {"seed": options.seed, "autocast": options.bf16, "accumulation": options.accumulation}
    if options.routers_only:
        changes["train"] = "routers"
    if distil:
        changes["distill_logits"] = distil
    with as_user_error(TypeError):  # a word where a number belongs
        config = recipe(**given)
        if config.steps is None and (options.steps or options.tokens):
            changes |= {"steps": steps, "epochs": None}
        return dataclasses.replace(config, **changes)


def _steps(options: TrainOptions, batches: int) -> int:
    if options.steps is not None:
        return options.steps
    if options.tokens is not None:
        return math.ceil(options.tokens / (options.batch * options.accumulation * options.context))
    return math.ceil((options.epochs or 1.0) * batches / options.accumulation)


def _is_there(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name; torch built without CUDA
        return False
    return True


def _parse(field: str) -> tuple[str, Any]:
    """``NAME=VALUE`` with a number, None, True or False, or else a word for VALUE."""
    name, equals, value = field.partition("=")
    if not equals:
        raise UserError(f"--set {field} says no value: write --set {field}=VALUE")
    try:
        return name.replace("-", "_"), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        spoken = value.strip().lstrip("+-").lower() in ("nan", "inf", "infinity")
        return name.replace("-", "_"), float(value) if spoken else value
