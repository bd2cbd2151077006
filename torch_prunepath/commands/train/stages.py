"""The stages of ``prunepath train``: what each recipe makes of a dense model, and LTE's routing in each of its two."""

from __future__ import annotations

from typing import Any

from torch import nn

from torch_prunepath.baselines.sigmoid import LTE, lte
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.conversion import sparsify
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.rules import held_rule
from torch_prunepath.train.recipes import LTE_RECIPE


def check_start(model: nn.Module, recipe: str, name: str) -> bool:
    """Whether the model that a run starts from is sparse.

    Args:
        model: what was loaded.
        recipe: name.
        name: what the message calls the model.

    Raises:
        UserError: if the recipe cannot start from it.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    if layers and recipe == LTE_RECIPE:
        raise UserError(f"--recipe {recipe} makes its own experts and {name} is sparse: start from the dense model")
    if any(held_rule(layer) is not None for layer in layers):
        raise UserError(f"{name} selects as --recipe {LTE_RECIPE} does, which no other recipe trains: start from dense")
    return bool(layers)


def convert(model: nn.Module, recipe: str, config: SparsifyConfig, data: Any) -> None:
    """Make a dense model sparse in place, as the recipe does; LTE's is left as its second stage has it.

    Raises:
        UserError: if that is refused.
    """
    with as_user_error(ValueError):
        if recipe != LTE_RECIPE:
            sparsify(model, config=config, calibration=data)
            return
        lte(model, expert_size=config.expert_size, seed=config.seed).start_second_stage()


def enter(model: nn.Module, recipe: str, stage: int) -> None:
    """Let a model route as a stage, counted from 0, wants it; nothing to do but for LTE."""
    if recipe == LTE_RECIPE:
        handle = LTE(model, None)
        (handle.start_first_stage, handle.start_second_stage)[stage]()
