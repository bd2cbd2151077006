"""What a sparse model is, as a dict that its ``config.json`` carries, and back.

The dict stands in ``config.quantization_config``, the one place that ``from_pretrained`` reads before it loads weights.
A reader that does not know the method skips it and loads the dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_prunepath.config import FORMAT_VERSION, FFNSpec, SparsifyConfig, check_tau, num_experts
from torch_prunepath.layer import ExpertsSpec, RoutedExperts
from torch_prunepath.layer.ffn import FFNView, weight_out_in
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.rules import HELD, held_rule
from torch_prunepath.layer.swap import make_routed

METHOD = "prunepath"


@dataclass(frozen=True)
class LayerManifest:
    """One sparse layer: where it is, how it routes, its tau and budget, whether its router has bias and norm."""

    ffn: FFNSpec
    experts: ExpertsSpec
    tau: float
    budget: float = 1.0
    router_bias: bool = False
    router_norm: bool = False
    selection: str | None = None
    """The rule of :data:`torch_prunepath.layer.rules.HELD` that stands in the place of ``experts.rule``, if any."""

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.selection is not None and self.selection not in HELD:
            raise ValueError(f"{self.ffn.name}: selection={self.selection!r} is not known: upgrade torch_prunepath")
        if not self.budget > 0:
            raise ValueError(f"{self.ffn.name}: budget={self.budget} must be positive")
        if self.experts.expert_size < 1:
            raise ValueError(f"{self.ffn.name}: expert_size={self.experts.expert_size} must be at least 1")
        experts = num_experts(self.ffn.ffn_size, self.experts.expert_size)
        if not 0 <= self.experts.shared < experts:
            raise ValueError(f"{self.ffn.name}: {self.experts.shared} of {experts} experts cannot be shared")


@dataclass(frozen=True)
class Manifest:
    """A whole model: its layers, and the configuration that made them."""

    layers: tuple[LayerManifest, ...]
    config: SparsifyConfig

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        whole = dataclasses.asdict(self)
        shared, layers = _factored(whole["layers"])
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "config": whole["config"],
            "shared": shared,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_dict` wrote, in this format or an earlier one.

        Raises:
            ValueError: if the format is newer than this package, or the data is damaged.
        """
        version = data.get("format_version")
        if not isinstance(version, int):
            raise ValueError("damaged prunepath manifest: no format_version; save the model again")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has prunepath format {version}, but the installed torch_prunepath reads up to "
                f"{FORMAT_VERSION}: upgrade torch_prunepath"
            )
        try:
            shared = data["shared"] if version >= 2 else {}
            layers = tuple(_layer(_merged(shared, layer)) for layer in data["layers"])
            return cls(layers, SparsifyConfig(**data["config"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"damaged prunepath manifest ({error}): save the model again") from error


def _factored(layers: Sequence[dict[str, Any]], apart: Sequence[str] = ("tau",)) -> tuple[dict[str, Any], list[Any]]:
    """What all layers share, and what remains of each; ``_merged`` puts them together again.

    tau stays with each layer, also where all are equal: it is what a person who reads the file looks for.
    """
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in layers]
    for key in layers[0] if layers else ():
        values = [layer[key] for layer in layers]
        if isinstance(values[0], dict):
            part, remains = _factored(values, apart=("name",))
            shared[key] = part
            for layer, rest in zip(own, remains, strict=True):
                if rest:
                    layer[key] = rest
        elif key not in apart and all(value == values[0] for value in values):
            shared[key] = values[0]
        else:
            for layer, value in zip(own, values, strict=True):
                layer[key] = value
    return shared, own


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: {**value, **own.get(key, {})} for key, value in shared.items() if isinstance(value, Mapping)}
    return {**shared, **own, **nested}


def _layer(data: Mapping[str, Any]) -> LayerManifest:
    return LayerManifest(**{**data, "ffn": FFNSpec(**data["ffn"]), "experts": ExpertsSpec(**data["experts"])})


def describe(model: nn.Module, config: SparsifyConfig) -> Manifest:
    """The manifest of a sparse model."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    return Manifest(tuple(map(_describe, layers)), config)


def _describe(layer: RoutedExperts) -> LayerManifest:
    bias = layer.router.bias is not None
    selection = held_rule(layer)
    return LayerManifest(layer.ffn, layer.experts, float(layer.tau), layer.budget, bias, layer.router_norm, selection)


def attach(model: nn.Module, manifest: Manifest | None) -> None:
    """Put the manifest where ``save_pretrained`` finds it, or take it away. Models without a config are left alone."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    if manifest is not None:
        config.quantization_config = manifest.to_dict()
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def attached(model: nn.Module) -> Manifest | None:
    """The manifest that the model's config carries, if any."""
    data = getattr(getattr(model, "config", None), "quantization_config", None)
    if data is None:
        return None
    data = data if isinstance(data, Mapping) else data.to_dict()
    return Manifest.from_dict(data) if data.get("quant_method") == METHOD else None


def saved_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """What a submodule may be called in the headed and the head-less variant of a transformers model."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name, prefix + name, name.removeprefix(prefix)


def resolve(model: nn.Module, ffn: FFNSpec) -> FFNView:
    """The FFN in ``model``, which may be the head-less or the headed variant of the model that was saved.

    Raises:
        ValueError: if there is none.
    """
    for name in saved_names(model, ffn.name):
        try:
            return FFNView(model, dataclasses.replace(ffn, name=name))
        except AttributeError:
            continue
    raise ValueError(
        f"the checkpoint says there is an FFN at {ffn.name!r}, but {type(model).__name__} has none: load it with the "
        "class that it was saved from"
    )


def rebuild(model: nn.Module, manifest: Manifest) -> None:
    """Make a dense model (usually still without weights) sparse as the manifest says, in place.

    Routers and permutations are left uninitialised, for a state dict to fill.

    Raises:
        ValueError: if the model does not hold what the manifest names. Nothing was changed then.
    """
    views = [resolve(model, layer.ffn) for layer in manifest.layers]
    for view in views:
        actual, spec = tuple(view.down_FD.shape), view.spec
        if actual != (spec.ffn_size, spec.hidden_size):
            raise ValueError(
                f"the checkpoint says that the FFN at {spec.name!r} is {spec.hidden_size}x{spec.ffn_size}, but "
                f"the model has {actual[1]}x{actual[0]}: config.json and the weights do not belong together"
            )
    for view, layer in zip(views, manifest.layers, strict=True):
        weight = weight_out_in(view.up)
        ffn, size = view.spec, layer.experts.expert_size
        router = Router(ffn.hidden_size, num_experts(ffn.ffn_size, size), bias=layer.router_bias).to(weight.dtype)
        router.router_norm = layer.router_norm
        with torch.device(weight.device):
            order_F = torch.arange(ffn.ffn_size)
        site = make_routed(view, layer.experts, router.to(weight.device), order_F, layer.tau, layer.budget)
        if layer.selection is not None:
            site.selection = HELD[layer.selection]
