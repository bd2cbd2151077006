"""The sparse layers of a model, and the FFN behind each, wherever the model is by now."""

from __future__ import annotations

import dataclasses

from torch import nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView


def sparse_layers(model: nn.Module) -> dict[str, RoutedExperts]:
    """The sparse layers of a model by qualified name, in module order.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}
    if not layers:
        raise ValueError("the model holds no sparse FFN: call torch_prunepath.sparsify(model) first")
    return layers


def sparse_views(model: nn.Module) -> dict[str, FFNView]:
    """The FFN behind each sparse layer of a model, by layer name, also where the model is nested in another since.

    Raises:
        ValueError: if the model holds no sparse FFN, or something was put between the halves of one.
    """
    return {name: FFNView(model, spec_here(name, layer)) for name, layer in sparse_layers(model).items()}


def spec_here(name: str, layer: RoutedExperts) -> FFNSpec:
    """Spec of the FFN behind a sparse layer that is called ``name`` by now, its projections inside of adapters.

    Raises:
        ValueError: if something was put between the halves of one that is split.
    """
    spec = layer.ffn
    if not spec.split:
        up, down = _innermost(layer, spec.up), _innermost(layer, spec.down)
        gate = None if spec.gate is None else _innermost(layer, spec.gate)
        return dataclasses.replace(spec, name=name, up=up, gate=gate, down=down)
    owner = owner_of(name, layer)
    return dataclasses.replace(spec, name=owner, up=name.removeprefix(f"{owner}."))


def owner_of(name: str, layer: RoutedExperts) -> str:
    """Name of the module that holds the FFN's projections, of a sparse layer that is called ``name`` by now.

    Raises:
        ValueError: if something was put between the halves of one that is split.
    """
    if not layer.ffn.split:
        return name
    owner, found, inside = f".{name}".rpartition(f".{layer.ffn.up}")
    if not found or inside[:1] not in ("", "."):
        raise ValueError(f"{name}: a module was put between it and the FFN that it is a part of: take that off first")
    return owner.removeprefix(".")


def _innermost(owner: nn.Module, part: str) -> str:
    """The name of a projection, or of what PEFT's adapters have taken in as theirs."""
    while isinstance(getattr(owner.get_submodule(part), "base_layer", None), nn.Module):
        part = f"{part}.base_layer"
    return part
