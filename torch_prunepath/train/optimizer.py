"""AdamW with separate learning rates for trunk, routers and normalisation layers, and the schedule of these rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.train.config import TrainConfig


def trained(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Return the parameters that a run changes, by name.

    Raises:
        ValueError: if no parameter that ``config.train`` names requires a gradient.
    """
    routers = {id(p) for layer in sparse_layers(model).values() for p in layer.router.parameters()}
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (config.train == "all" or id(p) in routers)
    }
    if not chosen:
        raise ValueError(f"no parameter that train={config.train!r} names requires a gradient: unfreeze some first")
    return chosen


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the :func:`trained` parameters, in groups that hold their peak learning rate as ``peak``.

    It is the fused implementation if all of them are on CUDA.
    """
    routers = {id(p) for layer in sparse_layers(model).values() for p in layer.router.parameters()}
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for p in trained(model, config).values():
        kind = "routers" if id(p) in routers else "norms" if id(p) in norms else "trunk"
        groups.setdefault((kind, p.dim() > 1 and kind != "norms"), []).append(p)
    peaks = {"trunk": config.lr, "routers": config.router_lr, "norms": config.norm_lr or config.lr}
    on_cuda = all(p.device.type == "cuda" for parameters in groups.values() for p in parameters)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": peaks[kind],
                "peak": peaks[kind],
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (kind, decays), parameters in groups.items()
        ],
        fused=on_cuda or None,
    )


def lr_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the factor, in [0, 1], of the peak learning rate at ``step`` (counted from 0) of ``steps``."""
    warmup = config.warmup * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1.0, steps - warmup) if step > warmup else 0.0
    if config.decay == "constant":
        return 1.0
    return 1 - along if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * along))
