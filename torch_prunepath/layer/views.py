"""The sparse layers of a model, and the FFN behind each, wherever the model is by now."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.sparse import NeuronRecorder, SparseDown, listed


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


def one_a_layer(
    layers: Mapping[str, Any], value: Any, check: Callable[[Any], float], of: str
) -> dict[str, float] | None:
    """Values for layers by name, from a mapping or from a sequence with one a layer; None if it is neither.

    Args:
        layers: the model's sparse layers.
        value: what a user gave.
        check: returns a value as a float, or raises ValueError.
        of: what the values are, for messages.

    Raises:
        ValueError: if a value is wrong, a sequence's length is wrong or a name is unknown.
    """
    if isinstance(value, Mapping):
        unknown = [name for name in value if name not in layers]
        if unknown:
            raise ValueError(f"no sparse layer is called {unknown[0]!r}; there are: {', '.join(layers)}")
        return {name: check(one) for name, one in value.items()}
    if _is_list(value):
        value = value.tolist() if isinstance(value, Tensor) else list(value)
        if len(value) != len(layers):
            raise ValueError(
                f"{len(value)} values of {of} for {len(layers)} sparse layers: give one a layer, or one number"
            )
        return {name: check(one) for name, one in zip(layers, value, strict=True)}
    return None


def _is_list(value: Any) -> bool:
    """Whether this holds several numbers, as a list or an array does; text does not."""
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or bool(getattr(value, "ndim", None))


def norm_keepers(layer: RoutedExperts, view: FFNView) -> list[RoutedExperts | SparseDown]:
    """The modules that keep the norms of one FFN: its sparse layer, and the other half of one that is split."""
    return [layer, view.down] if isinstance(view.down, SparseDown) else [layer]


def recording_neurons(
    layer: RoutedExperts, view: FFNView, recorder: NeuronRecorder
) -> contextlib.AbstractContextManager[None]:
    """Inside the context, the FFN tells the recorder what its neurons answer, if it has a threshold on them."""
    return listed(norm_keepers(layer, view)[-1], "neuron_recorders", recorder)


def check_readable(name: str, layer: RoutedExperts, view: FFNView) -> None:
    """Refuse thresholds for an FFN that has none yet, and whose weights have no norms that can be computed.

    Raises:
        ValueError: if it is so.
    """
    if all(keeper.has_norms or keeper.can_keep_norms() for keeper in norm_keepers(layer, view)):
        return
    raise ValueError(
        f"{name}: thresholds need the norms of its weights, which cannot be read as they are (quantised, sharded or on "
        "the meta device): set thresholds before that; their values may change afterwards"
    )


@torch.no_grad()
def write_thresholds(layer: RoutedExperts, view: FFNView, theta_x: float | None, theta_h: float | None) -> None:
    """Set the thresholds of one sparse layer, whose norms can be computed; None leaves one as it is."""
    for keeper in norm_keepers(layer, view):
        keeper.keep_norms()
    for theta, value in ((layer.theta_x, theta_x), (layer.theta_h, theta_h)):
        if value is not None:
            theta.fill_(value)


def _innermost(owner: nn.Module, part: str) -> str:
    """The name of a projection, or of what PEFT's adapters have taken in as theirs."""
    while isinstance(getattr(owner.get_submodule(part), "base_layer", None), nn.Module):
        part = f"{part}.base_layer"
    return part
