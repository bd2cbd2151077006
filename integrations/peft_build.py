"""Making PrunePath adapters on a base model: new ones from data, or empty ones for saved weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from torch_prunepath.config import FFNSpec, SparsifyConfig, num_experts
from torch_prunepath.conversion import densify, sparsify
from torch_prunepath.integrations.peft_layer import AdapterState, PrunePathLayer, site_of
from torch_prunepath.layer import is_sparse
from torch_prunepath.layer.ffn import FFNView, weight_out_in
from torch_prunepath.layer.manifest import LayerManifest, Manifest
from torch_prunepath.layer.rebuild import resolve
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.saving import describe
from torch_prunepath.layer.views import sparse_layers

SAMPLE = 64
"""Number of the base model's weights that an adapter keeps to recognise the model: few enough for a configuration file.
A guess."""

SAME_MODEL = 0.7
"""Largest distance between two samples of one model, relative to the longer one. The distance of unrelated samples is
about 1.4, and fine-tuning changes weights by a few percent. This is halfway between; chosen without measurement."""


@dataclasses.dataclass(frozen=True)
class Made:
    """An adapter that is not yet on its base model.

    Attributes:
        manifest: description of the adapter's layers.
        parts: each FFN of the base model, and the adapter's state for it.
        sample: some of the base model's weights, by :func:`sample_of`.
    """

    manifest: Manifest
    parts: list[tuple[FFNSpec, AdapterState]]
    sample: list[float]


def layers_of(root: nn.Module) -> dict[str, PrunePathLayer]:
    """Return the PrunePath layers on a base model, by qualified name."""
    return {name: module for name, module in root.named_modules() if isinstance(module, PrunePathLayer)}


def check_base(root: nn.Module) -> None:
    """Refuse a base model that cannot take adapters.

    Raises:
        ValueError: if it has adapters already, is sparse, or is quantised.
    """
    if isinstance(root, PeftModel | BaseTuner):
        raise ValueError(
            "the model is a PeftModel already: call add_adapter for another PrunePath adapter; beside an adapter of "
            "another kind, pass the base model itself, model.get_base_model()"
        )
    if layers_of(root):
        raise ValueError(
            "the base model has PrunePath adapters already: call add_adapter on its PeftModel for another one, or "
            "unload() first"
        )
    if any(is_sparse(module) for module in root.modules()):
        raise ValueError(
            "the base model is sparse already: an adapter needs the dense model; call torch_prunepath.densify(model) "
            "first, or train the sparse model without an adapter"
        )
    if getattr(getattr(root, "config", None), "quantization_config", None) is not None:
        raise ValueError(
            "the base model carries a quantization_config: load it unquantised "
            "(a model dequantised from GGUF: delete model.config.quantization_config)"
        )


@contextlib.contextmanager
def bare(root: nn.Module) -> Iterator[None]:
    """Remove every adapter from the base model while the context is open, then put them back."""
    ours = list(layers_of(root).values())
    wrapped = [
        (parent, name, child)
        for parent in root.modules()
        if not isinstance(parent, BaseTunerLayer)
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer) and not isinstance(child, PrunePathLayer)
    ]
    try:
        for layer in ours:
            layer.remove()
        for parent, name, child in wrapped:
            parent._modules[name] = child.get_base_layer()
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
        for layer in ours:
            layer.install()


def make(root: nn.Module, config: SparsifyConfig, tau: float, **given: Any) -> Made:
    """Make a new adapter: group neurons and fit routers as :func:`torch_prunepath.sparsify` does.

    The base model is afterwards as it was.

    Args:
        root: the base model.
        config: how experts and routers are built.
        tau: in (0, 1].
        **given: further arguments of :func:`torch_prunepath.sparsify`: data, and which FFNs.

    Raises:
        ValueError: if :func:`torch_prunepath.sparsify` refuses the model, config or data, or if peft's
            ``low_cpu_mem_usage`` puts new parameters on the meta device.
    """
    if _parameters_get_no_data():
        raise ValueError(
            "low_cpu_mem_usage=True leaves a new adapter without weights: leave it out, and use it only to load one"
        )
    with bare(root):
        sparsify(root, tau, config=config, **given)
        try:
            manifest = describe(root)
            states = [
                AdapterState(part.experts, part.budget, layer.router, layer.permutation.clone(), part.tau, filled=True)
                for part, layer in zip(manifest.layers, sparse_layers(root).values(), strict=True)
            ]
        finally:
            densify(root)
        sample = sample_of(FFNView(root, manifest.layers[0].ffn))
    return Made(manifest, [(part.ffn, state) for part, state in zip(manifest.layers, states, strict=True)], sample)


def _parameters_get_no_data() -> bool:
    """Whether peft currently puts every new parameter on the meta device."""
    probe = nn.Module()
    probe.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    return bool(probe.weight.is_meta)


def remake(root: nn.Module, manifest: Manifest, sample: list[float], source: str | None) -> Made:
    """Make an adapter without weights, into which saved weights can be loaded.

    Args:
        root: the base model.
        manifest: description of the saved adapter's layers.
        sample: some weights of the base model for which the adapter was made.
        source: name of that model, for messages.

    Raises:
        ValueError: if the base model is not the one for which the adapter was made.
    """
    theirs = f"the adapter was made for {source or 'another model'}"
    with bare(root):
        try:
            views = [resolve(root, layer.ffn) for layer in manifest.layers]
        except ValueError as error:
            raise ValueError(f"{theirs}: {error}") from error
        for view, layer in zip(views, manifest.layers, strict=True):
            found, spec = tuple(view.down_FD.shape), view.spec
            if spec.name != layer.ffn.name:
                raise ValueError(
                    f"{theirs}, where there is an FFN at {layer.ffn.name!r}; here it is at {spec.name!r}: load the "
                    "base model with the class that the adapter was made with"
                )
            if found != (spec.ffn_size, spec.hidden_size):
                raise ValueError(
                    f"{theirs}, where the FFN at {spec.name!r} is {spec.hidden_size}x{spec.ffn_size}; here it is "
                    f"{found[1]}x{found[0]}: load it onto its own base model"
                )
        if not resembles(sample_of(views[0]), sample):
            raise ValueError(
                f"{theirs}: this one has the same shape but other weights, or its neurons in another order; load the "
                "adapter onto its own base model"
            )
        parts = [(view.spec, _empty(view, layer)) for view, layer in zip(views, manifest.layers, strict=True)]
    return Made(manifest, parts, sample)


def _empty(view: FFNView, layer: LayerManifest) -> AdapterState:
    spec, weight = view.spec, weight_out_in(view.up)
    experts = num_experts(spec.ffn_size, layer.experts.expert_size)
    bias_E = weight.new_zeros(experts) if layer.router_bias else None
    router = Router.of(weight.new_zeros(experts, spec.hidden_size), bias_E, router_norm=layer.router_norm)
    order_F = torch.arange(spec.ffn_size, device=weight.device)
    state = AdapterState(layer.experts, layer.budget, router, order_F, layer.tau, filled=False)
    if layer.theta_x or layer.theta_h:
        state.restore_thresholds(view, layer.theta_x, layer.theta_h)
    return state


def sample_of(view: FFNView) -> list[float]:
    """Choose some of the FFN's weights, evenly spread; return an empty list if the model has no data yet."""
    down_FD = view.down_FD.detach()
    if down_FD.is_meta:
        return []
    D = down_FD.shape[1]
    places = torch.linspace(0, down_FD.numel() - 1, SAMPLE, dtype=torch.float64).long().to(down_FD.device)
    return [float(f"{value:.4g}") for value in down_FD[places // D, places % D].tolist()]


def resembles(mine: list[float], theirs: list[float]) -> bool:
    """Whether two samples can be of one model, in other dtypes or fine-tuned; True if one is empty."""
    if not mine or not theirs:
        return True
    size = max(math.hypot(*mine), math.hypot(*theirs))
    return math.dist(mine, theirs) <= SAME_MODEL * size if len(mine) == len(theirs) else False


def attach_parts(root: nn.Module, made: Made, adapter_name: str) -> list[PrunePathLayer]:
    """Put an adapter onto the base model.

    Raises:
        ValueError: if it covers other FFNs than the adapters that are there. Nothing is changed then.
    """
    there = layers_of(root)
    sites = {site_of(spec): (spec, state) for spec, state in made.parts}
    if there and there.keys() != sites.keys():
        odd = sorted(there.keys() ^ sites.keys())[0]
        raise ValueError(
            f"the adapters on one base model must cover the same FFNs, but {odd!r} is only in one of them: make the "
            "new adapter on the same base model, or unload() the others first"
        )
    found = []
    for site, (spec, state) in sites.items():
        layer = there.get(site) or PrunePathLayer(root.get_submodule(spec.name), spec)
        layer.adapters[adapter_name] = state
        if site not in there:
            layer.install()
        found.append(layer)
    return found
