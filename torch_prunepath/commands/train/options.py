"""What ``prunepath train`` takes. Nothing heavy is imported here, so that help is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_prunepath.commands.options import SETTINGS
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.options import flag, option, settings

_POSITIVE = ("steps", "tokens", "epochs", "batch", "accumulation", "save_every")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a sparse model, or a dense one made sparse first, and save the checkpoint.

    Attributes:
        model: name or folder of a causal language model, dense or sparse, or a GGUF file.
        output: folder to write; must not exist, or be empty.
        recipe: ours (for many sparsities; default), held (for one), or paper.
        target_sparsity: sparsity that tau is set to at the end; held trains for it.
        resume: go on with an unfinished run to the same output.
        save_every: steps after which the unfinished run is saved.
        text: UTF-8 text to train on.
        dataset: data set to train on, by the name that the package datasets knows.
        subset: configuration of the data set.
        split: split of the data set.
        text_column: column of the data set that holds text.
        eval_text: UTF-8 text to measure perplexity on, before and after.
        context: tokens of a window.
        steps: optimiser steps.
        tokens: tokens to train on.
        epochs: passes over the text (default: 1).
        batch: windows a batch.
        accumulation: batches a step.
        lr: peak learning rate (default: the recipe's).
        router_lr: learning rate of routers (default: the recipe's).
        fields: field of the recipe or of TrainConfig, in place of the recipe's own; can be repeated.
        distil: learn from the dense model too, which takes more time and memory; 0: do not (default: 1 for ours and
            held if MODEL is dense, else 0).
        teacher: the dense model for --distil, where it is not MODEL.
        routers_only: leave all weights but the routers' as they are.
        bf16: compute in bfloat16; weights stay in float32.
        compile: less time a step, after a minute or two: a mode of torch.compile (default: default) or a backend.
        checkpointing: less memory, more time.
        device: where to run (default: cuda if there is any, else cpu).
        seed: seed of everything random (default: 0).
        include: names or patterns of the FFNs to make sparse, such as 'layers.*.mlp' (default: all).
        exclude: names or patterns of FFNs to leave dense, such as 'model.layers.0.*' or vision_tower.
        settings: fields of :class:`torch_prunepath.SparsifyConfig` in place of the recipe's own.

    Raises:
        ValueError: if a value is not allowed, or two exclude each other.
    """

    model: str = option(positional=True, metavar="MODEL")
    output: Path = option("-o", "--output")
    recipe: str = "ours"
    target_sparsity: float = option(default=0.7, metavar="SHARE")
    resume: bool = False
    save_every: int = option(default=500, metavar="STEPS")

    text: str | None = option(default=None, group="data", one_of="text", required=True, metavar="FILE")
    dataset: str | None = option(default=None, group="data", one_of="text", metavar="NAME")
    subset: str | None = option(default=None, group="data", metavar="NAME")
    split: str = option(default="train", group="data")
    text_column: str = option(default="text", group="data", metavar="NAME")
    eval_text: str | None = option(default=None, group="data", metavar="FILE")
    context: int = option(default=512, group="data", metavar="TOKENS")

    steps: int | None = option(default=None, group="training", one_of="length")
    tokens: int | None = option(default=None, group="training", one_of="length")
    epochs: float | None = option(default=None, group="training", one_of="length")
    batch: int = option(default=8, group="training", metavar="WINDOWS")
    accumulation: int = option(default=1, group="training", metavar="BATCHES")
    lr: float | None = option(default=None, group="training")
    router_lr: float | None = option(default=None, group="training")
    fields: Sequence[str] = option("--set", default=(), group="training", action="append", metavar="NAME=VALUE")
    distil: float | None = option(default=None, group="training", nargs="?", const=1.0, metavar="WEIGHT")
    teacher: str | None = option(default=None, group="training", metavar="MODEL")
    routers_only: bool = option(default=False, group="training")
    bf16: bool = option(default=False, group="training")
    compile: str | None = option(default=None, group="training", nargs="?", const="default", metavar="HOW")
    checkpointing: bool = option(default=False, group="training")
    device: str | None = option(default=None, group="training")
    seed: int = option(default=0, group="training")
    include: Sequence[str] | None = option(default=None, group="training", action="extend", metavar="PATTERN")
    exclude: Sequence[str] | None = option(default=None, group="training", action="extend", metavar="PATTERN")
    settings: Mapping[str, Any] = settings(
        SparsifyConfig, f"{SETTINGS}, in place of the recipe's", leave_out=["seed"], defaults=False
    )

    @property
    def about_experts(self) -> list[str]:
        """Names of the options given that say how experts are made, and so belong to a dense model."""
        return [*self.settings, *(name for name in ("include", "exclude") if getattr(self, name) is not None)]

    def __post_init__(self) -> None:
        if not 0.0 <= self.target_sparsity < 1.0:
            raise ValueError(
                f"--target-sparsity {self.target_sparsity} is outside [0, 1): 0.8 leaves a fifth of the neurons active"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{flag(name)} {value} must be positive")
        if sum(value is not None for value in (self.steps, self.tokens, self.epochs)) > 1:
            raise ValueError("--steps, --tokens and --epochs all say how long to train: give one of them")
        if self.compile and self.checkpointing:
            raise ValueError("--compile and --checkpointing exclude each other: compiled blocks cannot be run again")
        if self.context < 2:
            raise ValueError(f"--context {self.context} leaves nothing to predict: give at least 2")
