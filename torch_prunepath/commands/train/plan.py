"""What ``prunepath train`` was asked, as a training configuration and as experts to train."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_prunepath.commands.train.source import Source
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.train.compiling import check_how
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.recipes import EXPERTS, LTE_RECIPE, RECIPES

DISTILLED = ("ours", "held")
"""Recipes that learn from the dense model unless they are asked not to."""


@dataclass(frozen=True)
class Options:
    """What ``prunepath train`` was asked.

    Attributes:
        model: a name or folder of a dense or sparse model, or a GGUF file.
        source: what to train on.
        eval_text: a UTF-8 file to measure perplexity on, if any.
        output: the folder to write.
        recipe: a name in :data:`torch_prunepath.train.recipes.RECIPES`.
        target_sparsity: what the checkpoint's tau is set to realise; recipes for one sparsity train for it.
        steps: optimiser steps; or else ``tokens`` to train on; or else ``epochs``, by default 1 (a stage).
        tokens: see ``steps``.
        epochs: see ``steps``.
        batch: windows a batch.
        accumulation: batches a step.
        context: tokens a window.
        fields: of the recipe or of :class:`TrainConfig`, in place of the recipe's own, as ``NAME=VALUE``.
        distil: weight of the distillation from the dense model; None: see :meth:`distillation`.
        teacher: the dense model, where it is not ``model``.
        routers_only: leave all other weights as they are.
        bf16: compute in bfloat16 autocast.
        compile: the mode or backend of ``torch.compile`` that the model's blocks run through, or None.
        checkpointing: compute activations again in the backward pass, to save memory.
        device: where to run.
        seed: of everything random.
        save_every: steps between saved states of the unfinished run.
        resume: go on with an unfinished run.
        settings: fields of :class:`SparsifyConfig` in place of the recipe's own.
    """

    model: str
    source: Source
    eval_text: str | None
    output: Path
    recipe: str
    target_sparsity: float
    steps: int | None
    tokens: int | None
    epochs: float | None
    batch: int
    accumulation: int
    context: int
    fields: Sequence[str]
    distil: float | None
    teacher: str | None
    routers_only: bool
    bf16: bool
    compile: str | None
    checkpointing: bool
    device: str
    seed: int
    save_every: int
    resume: bool
    settings: Mapping[str, Any]

    def check(self) -> None:
        """Refuse before anything heavy runs.

        Raises:
            UserError: with a remedy.
        """
        if self.recipe not in RECIPES:
            raise UserError(f"--recipe {self.recipe!r} is not known: choose one of {', '.join(RECIPES)}")
        if not 0.0 <= self.target_sparsity < 1.0:
            raise UserError(
                f"--target-sparsity {self.target_sparsity} is outside [0, 1): 0.8 leaves a fifth of the neurons active"
            )
        for name in ("steps", "tokens", "epochs", "batch", "accumulation", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
        if sum(value is not None for value in (self.steps, self.tokens, self.epochs)) > 1:
            raise UserError("--steps, --tokens and --epochs all say how long to train: give one of them")
        with as_user_error(ValueError):
            check_how(self.compile or False)
        if self.compile and self.checkpointing:
            raise UserError("--compile and --checkpointing exclude each other: compiled blocks cannot be run again")
        if self.context < 2:
            raise UserError(f"--context {self.context} leaves nothing to predict: give at least 2")
        if not _is_there(self.device):
            raise UserError(f"--device {self.device}: this machine has none: leave it out, or give cpu")
        distil = self.distillation(dense=True)
        if self.teacher is not None and not distil:
            raise UserError("--teacher is only for --distil: give both, or none")
        self.source.check()
        if self.eval_text is not None:
            Source(self.eval_text).check()
        if self.recipe == LTE_RECIPE:
            self._check_lte()
        self.experts()
        self.stages(1000, distil)

    def _check_lte(self) -> None:
        fixed = next((name for name in self.settings if name != "expert_size"), None)
        if fixed is not None:
            raise UserError(f"--recipe lte has experts and routers of its own: leave --{fixed.replace('_', '-')} out")
        if self.routers_only:
            raise UserError("--recipe lte trains all weights, in its second stage without routers: no --routers-only")

    def experts(self) -> SparsifyConfig:
        """How a dense model is made sparse.

        Raises:
            UserError: if a setting is refused.
        """
        with as_user_error(ValueError):
            base = dataclasses.replace(EXPERTS[self.recipe], seed=self.seed)
            return dataclasses.replace(base, **self.settings)

    def distillation(self, dense: bool) -> float:
        """Weight of the distillation: as asked, or 1 where a recipe of ours trains all weights.

        Args:
            dense: whether the dense model is at hand: MODEL is dense, or there is a teacher.
        """
        if self.distil is not None:
            return self.distil
        return 1.0 if dense and self.recipe in DISTILLED and not self.routers_only else 0.0

    def stages(self, batches: int, distil: float) -> tuple[TrainConfig, ...]:
        """How it is trained, stage after stage.

        Args:
            batches: of one pass over the data.
            distil: weight of the distillation.

        Raises:
            UserError: if a field is not known or a value is refused.
        """
        recipe = RECIPES[self.recipe]
        parameters = inspect.signature(recipe).parameters
        fields = dict(_parse(field) for field in self.fields)
        if not fields.keys().isdisjoint(("distil", "distill_logits")):
            raise UserError("distillation needs the dense model: give --distil WEIGHT in place of --set")
        steps = self._steps(batches)
        known = {"steps": steps, "epochs": self.epochs or 1.0, "sparsity": self.target_sparsity}
        given = {name: value for name, value in (known | fields).items() if name in parameters}
        changes = {name: value for name, value in fields.items() if name not in parameters}
        names = {field.name for field in dataclasses.fields(TrainConfig)} - {"steps", "epochs", "phases"}
        if self.recipe == LTE_RECIPE:
            names -= {"lte_separation", "separation_eta", "train"}  # not the same in both stages
        unknown = sorted(changes.keys() - names)
        if unknown:
            choices = ", ".join(sorted(names | set(parameters)))
            raise UserError(f"--set {unknown[0]} is no field of the recipe or of TrainConfig: choose from {choices}")
        changes |= {"seed": self.seed, "autocast": self.bf16, "accumulation": self.accumulation}
        if self.routers_only:
            changes["train"] = "routers"
        if distil:
            changes["distill_logits"] = distil
        with as_user_error(ValueError, TypeError):
            made = recipe(**given)
            stages = made if isinstance(made, tuple) else (made,)
            if stages[0].steps is None and (self.steps or self.tokens):
                changes |= {"steps": steps, "epochs": None}
            stages = tuple(dataclasses.replace(config, **changes) for config in stages)
        return stages

    def _steps(self, batches: int) -> int:
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(self.tokens / (self.batch * self.accumulation * self.context))
        stages = 2 if self.recipe == LTE_RECIPE else 1  # of the recipes that count steps
        return math.ceil(stages * (self.epochs or 1.0) * batches / self.accumulation)


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
        return name.replace("-", "_"), value
