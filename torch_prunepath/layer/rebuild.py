"""Making a dense model sparse as a manifest says, for a state dict to fill."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from torch_prunepath.config import FFNSpec, SparsifyConfig, num_experts
from torch_prunepath.layer.ffn import FFNView, site_name, weight_out_in
from torch_prunepath.layer.manifest import LayerManifest, Manifest
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.saving import attach
from torch_prunepath.layer.sparse import RoutedExperts, is_sparse
from torch_prunepath.layer.swap import Swap, make_all_routed
from torch_prunepath.layer.views import check_readable, write_thresholds

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=nn.Module)
Place = tuple[FFNView, LayerManifest]
"""An FFN of a model, and what the manifest says of it."""


def rebuild(model: ModelT, manifest: Manifest | Mapping[str, Any]) -> ModelT:
    """Give a dense model the sparse layers of another one, in place, for ``load_state_dict`` to fill.

    ``from_pretrained`` does this by itself. It is for state dicts of one's own: of models without a config, from
    ``torch.save``, from a training loop. Until a state dict is loaded, routers are random and neurons in no order.

    Args:
        model: a dense model, with or without weights (meta device), whose FFNs are those that the manifest names.
        manifest: what :func:`torch_prunepath.describe` returned for the sparse model, or the dict that its
            ``to_dict()`` made of it.

    Returns:
        The same model; its layers' tau and budgets are the manifest's.

    Raises:
        ValueError: if the manifest is damaged or empty, the model is sparse already, or does not hold what the
            manifest names. Nothing was changed then.
        TypeError: if this is no model.

    Example::

        torch.save((torch_prunepath.describe(model).to_dict(), model.state_dict()), "sparse.pt")
        manifest, weights = torch.load("sparse.pt")
        torch_prunepath.rebuild(dense_model, manifest).load_state_dict(weights)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a model (torch.nn.Module) is needed, not a {type(model).__name__}: build the dense model first"
        )
    if not isinstance(manifest, Manifest):
        manifest = Manifest.from_dict(manifest)
    if any(is_sparse(module) for module in model.modules()):
        raise ValueError("the model is sparse already: rebuild a dense one, or densify(model) first")
    places = find_places(model, manifest)
    if any((layer.theta_x or layer.theta_h) and view.down_FD.is_meta for view, layer in places):
        raise ValueError(
            "the manifest has thresholds, which need norms of the model's weights, and those are on the meta device: "
            "give them data first, model.to_empty(device='cpu')"
        )
    build(model, places, manifest.config)
    for place in places:
        restore_thresholds(*place)
    attach(model)
    return model


def build(model: nn.Module, places: list[Place], config: SparsifyConfig) -> None:
    """Make FFNs sparse in place, their weights laid out as sparse layers keep them; routers hold nothing of use yet."""
    swaps = []
    for view, layer in places:
        weight, ffn, size = weight_out_in(view.up), view.spec, layer.experts.expert_size
        router = Router(ffn.hidden_size, num_experts(ffn.ffn_size, size), bias=layer.router_bias).to(weight.dtype)
        router.router_norm = layer.router_norm
        with torch.device(weight.device):
            order_F = torch.arange(ffn.ffn_size)
        rest = (layer.tau, layer.budget, layer.made_with or config, layer.path)
        swaps.append(Swap(view, layer.experts, router.to(weight.device), order_F, *rest))
    make_all_routed(swaps)


def restore_thresholds(view: FFNView, layer: LayerManifest) -> None:
    """Give a sparse layer the thresholds that its manifest says, if any; norms follow when weights are loaded.

    Raises:
        ValueError: if there are some, and the layer's weights have no data (meta device).
    """
    site = view.up if view.spec.split else view.owner
    assert isinstance(site, RoutedExperts)
    if layer.theta_x or layer.theta_h:
        check_readable(view.site, site, view)
        write_thresholds(site, view, layer.theta_x, layer.theta_h)


def saved_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """What a submodule may be called in the headed and the head-less variant of a transformers model."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name, prefix + name, name.removeprefix(prefix)


def resolve(model: nn.Module, ffn: FFNSpec) -> FFNView:
    """The FFN in ``model``, which may be the head-less or the headed variant of the model that was saved.

    Raises:
        ValueError: if there is none.
    """
    view = _find(model, ffn)
    if view is None:
        raise ValueError(_has_none(model, ffn))
    return view


def _find(model: nn.Module, ffn: FFNSpec) -> FFNView | None:
    for name in saved_names(model, ffn.name):
        try:
            return FFNView(model, dataclasses.replace(ffn, name=name))
        except AttributeError:
            continue
    return None


def _has_none(model: nn.Module, ffn: FFNSpec) -> str:
    return (
        f"the checkpoint says there is an FFN at {ffn.name!r}, but {type(model).__name__} has none: load it with the "
        "class that it was saved from"
    )


def find_places(model: nn.Module, manifest: Manifest) -> list[Place]:
    """Find the FFNs that a manifest names in a model, in the manifest's order.

    The model may be a part of the one that was saved, as ``T5EncoderModel`` is of a sequence-to-sequence model, or have
    fewer layers: what it does not have is left out, as the dense checkpoint's weights are.

    Raises:
        ValueError: if an FFN is missing though its neighbours are there, none is there, or sizes differ.
    """
    found = [(_find(model, layer.ffn), layer) for layer in manifest.layers]
    places = [(view, layer) for view, layer in found if view is not None]
    missing = [layer.ffn for view, layer in found if view is None]
    known = {view.spec.name for view, _ in places}
    for ffn in missing:
        if not places or not _is_left_out(model, ffn, known):
            raise ValueError(_has_none(model, ffn))
    for view, _ in places:
        actual, spec = tuple(view.down_FD.shape), view.spec
        if actual != (spec.ffn_size, spec.hidden_size):
            raise ValueError(
                f"the checkpoint says that the FFN at {spec.name!r} is {spec.hidden_size}x{spec.ffn_size}, but "
                f"the model has {actual[1]}x{actual[0]}: config.json and the weights do not belong together"
            )
    if missing:
        logger.info(
            "%s has %d of the checkpoint's %d sparse FFNs: %s ... left out",
            type(model).__name__, len(places), len(found), site_name(missing[0]),
        )  # fmt: skip
    return places


def _is_left_out(model: nn.Module, ffn: FFNSpec, known: set[str]) -> bool:
    """Whether a model lacks a whole part in which the FFN is, or so many layers, of which the others are sparse.

    A layer that is missing from the midst of a list is a mistake in the manifest instead: another FFN, whose routers
    the checkpoint holds, would be left dense.
    """
    for name in saved_names(model, ffn.name):
        owner: nn.Module = model
        for part in filter(None, name.split(".")):
            if part not in owner._modules:
                break
            owner = owner._modules[part]  # type: ignore[assignment]
        if isinstance(owner, nn.ModuleList):
            inside = {key for key, module in model.named_modules() if any(module is child for child in owner)}
            return all(any(k == key or k.startswith(f"{key}.") for k in known) for key in inside)
    return True
