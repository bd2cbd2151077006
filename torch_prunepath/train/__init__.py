"""Training sparse models: objective, schedules, a controller of realised sparsity, a loop.

from torch_prunepath.train import recipes, train
train(model, batches, recipes.ours(steps=1000))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_prunepath.layer.layout import contiguous
from torch_prunepath.train import losses, recipes
from torch_prunepath.train.compiling import compiled_blocks
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.controller import SparsityController
from torch_prunepath.train.loop import train
from torch_prunepath.train.objective import Objective
from torch_prunepath.train.schedule import Phase, all_experts, draw, fixed_tau, hold, ramp
from torch_prunepath.train.state import Progress, TrainState
from torch_prunepath.train.tape import RoutedCall, RoutingTape

if TYPE_CHECKING:
    from torch_prunepath.train.trainer import PrunePathTrainer, trainer_arguments

__all__ = [
    "Objective",
    "Phase",
    "Progress",
    "PrunePathTrainer",
    "RoutedCall",
    "RoutingTape",
    "SparsityController",
    "TrainConfig",
    "TrainState",
    "all_experts",
    "compiled_blocks",
    "contiguous",
    "draw",
    "fixed_tau",
    "hold",
    "losses",
    "ramp",
    "recipes",
    "train",
    "trainer_arguments",
]


def __getattr__(name: str) -> Any:
    # transformers.Trainer takes seconds to import, and needs accelerate.
    if name in ("PrunePathTrainer", "trainer_arguments"):
        from torch_prunepath.train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
