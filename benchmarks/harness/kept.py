"""Tensors and converted models in safetensors files, with JSON for the rest: files that hold no code.

A converted model is kept as its tensors and, for each sparse layer, what its router is and how it selects. It comes
back by making a dense model of the same kind sparse in the plainest way, and giving its layers these routers and
weights.

Shapes: D hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, sparse_layers, sparsify
from torch_prunepath.baselines.routed import refuse_saving
from torch_prunepath.baselines.routers import MLPRouter, UnitRouter
from torch_prunepath.baselines.rules import above_threshold, cumulative_share, near_largest, top_share
from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.layer import ExpertsSpec, RoutedExperts
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.saving import detach
from torch_prunepath.layer.sparse import SelectionRule

SAID = "prunepath"
"""Key of a file's metadata that holds the JSON."""
RULES: Mapping[str, SelectionRule] = MappingProxyType(
    {rule.__name__: rule for rule in (top_share, above_threshold, near_largest, cumulative_share)}
)
ROUTERS: Mapping[str, type[Router]] = MappingProxyType(
    {kind.__name__: kind for kind in (Router, UnitRouter, MLPRouter)}
)
TRAITS = ("router_norm", "activation", "unit_input", "magnitude")
"""Attributes that routers have besides weights."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], said: Any) -> None:
    """Keep tensors, and something that JSON can hold. A tensor that has two names is kept twice."""
    # Clones, because safetensors takes neither shared memory nor other strides.
    apart = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(apart, path, metadata={SAID: json.dumps(said)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What :func:`save_tensors` kept, on the CPU.

    Raises:
        UserError: if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()[SAID])
            return {name: file.get_tensor(name) for name in file.keys()}, said  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be loaded ({one_line(error)}): remove it, and run again") from error


def describe(model: nn.Module) -> dict[str, Any]:
    """What a converted model is besides its tensors, ready for JSON."""
    return {name: _layer(layer) for name, layer in sparse_layers(model).items()}


def _layer(layer: RoutedExperts) -> dict[str, Any]:
    router = layer.router
    return {
        "experts": dataclasses.asdict(layer.experts),
        "budget": layer.budget,
        "tau": float(layer.tau),
        "rule": None if layer.selection is None else layer.selection.__name__,
        "router": type(router).__name__,
        "traits": {name: getattr(router, name) for name in TRAITS if hasattr(router, name)},
        "trains": router.weight.requires_grad,
    }


def restore(dense: nn.Module, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Make a dense model what a converted one was, in place; its device stays.

    Args:
        dense: a model of the kind that was converted, whatever its weights.
        tensors: ``state_dict()`` of the converted one.
        said: what :func:`describe` answered of it.
    """
    sizes = {layer["experts"]["expert_size"] for layer in said.values()}
    assert len(sizes) == 1
    plain = SparsifyConfig(sizes.pop(), partition="contiguous", router="zero", budget="uniform")
    sparsify(dense, tau=1.0, config=plain, progress=False)
    detach(dense)  # it says how the plain one was made
    for name, layer in sparse_layers(dense).items():
        about, device = said[name], layer.router.weight.device
        layer.experts, layer.budget = ExpertsSpec(**about["experts"]), about["budget"]
        layer.selection = None if about["rule"] is None else RULES[about["rule"]]
        layer.router = _router(f"{name}.router", tensors, about).to(device).requires_grad_(about["trains"])
        layer.tau.fill_(about["tau"])
    for rule in {about["rule"] for about in said.values()} - {None}:
        refuse_saving(dense, RULES[rule])
    dense.load_state_dict(tensors)


def _router(name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Router:
    router = ROUTERS[about["router"]].of(tensors[f"{name}.weight"].clone(), _bias(f"{name}.bias", tensors))
    if isinstance(router, MLPRouter):
        router.inner = Router.of(tensors[f"{name}.inner.weight"].clone(), _bias(f"{name}.inner.bias", tensors))
    for trait, value in about["traits"].items():
        setattr(router, trait, value)
    return router


def _bias(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    return tensors[name].clone() if name in tensors else None
