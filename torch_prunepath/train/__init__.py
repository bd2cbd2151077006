"""Training sparse models: objective, schedules, a controller of realised sparsity, a loop.

from torch_prunepath.train import recipes, train
train(model, batches, recipes.ours(steps=1000))
"""

from __future__ import annotations

from torch_prunepath.train import losses, recipes
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.controller import SparsityController
from torch_prunepath.train.loop import train
from torch_prunepath.train.schedule import Phase, all_experts, draw, fixed_tau, hold, ramp
from torch_prunepath.train.state import TrainState
from torch_prunepath.train.tape import RoutedCall, RoutingTape

__all__ = [
    "Phase",
    "RoutedCall",
    "RoutingTape",
    "SparsityController",
    "TrainConfig",
    "TrainState",
    "all_experts",
    "draw",
    "fixed_tau",
    "hold",
    "losses",
    "ramp",
    "recipes",
    "train",
]
