"""Fitting the routers of a sparse model anew.

Shapes: N tokens, D hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_prunepath.calibrate import visit_inputs
from torch_prunepath.data import as_inputs
from torch_prunepath.ffn import FFNView
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.manifest import attach, attached, describe
from torch_prunepath.planning import fitted_router
from torch_prunepath.sparsify import sparse_views
from torch_prunepath.sparsity import register_routing_hook, sparse_layers

ModelT = TypeVar("ModelT", bound=nn.Module)


def fit_routers(model: ModelT, batches: Any, *, tokenizer: Any = None, progress: bool = True) -> ModelT:
    """Fit the routers of a sparse model anew, in place, to what its experts contribute on ``batches``.

    Layer by layer, on the hidden states of the dense model: soft-label cross-entropy of ``softmax(router(x))`` against
    each expert's share of the contribution norm.

    Args:
        model: a sparse model.
        batches: token ids ``[B, T]``, dicts of model inputs, an iterable of either, or texts with ``tokenizer``; all
            of it is used, in one batch.
        tokenizer: for texts.
        progress: show a progress bar.

    Raises:
        ValueError: if the model holds no sparse FFN or the data does not fit. No router is changed.
    """
    layers, views = sparse_layers(model), sparse_views(model)
    inputs = as_inputs(batches, model, tokenizer)
    fitted: dict[str, tuple[Tensor, Tensor]] = {}
    with tqdm(total=len(views), desc="fitting routers", unit="layer", disable=not progress) as bar:

        def visit(view: FFNView, x_ND: Tensor) -> None:
            layer = layers[view.site]
            size, shared = layer.experts.expert_size, layer.experts.shared
            fitted[view.site] = fitted_router(x_ND, view.hidden(x_ND), view.down_FD, size, layer.router_norm, shared)
            bar.update()

        # Every expert active: hidden states as the dense model has them.
        with register_routing_hook(model, lambda routing: torch.ones_like(routing.mask_TE)):
            visit_inputs(model, list(views.values()), inputs, visit)
    with torch.no_grad():
        for name, (weight_ED, bias_E) in fitted.items():
            _load_router(layers[name], weight_ED, bias_E)
    manifest = attached(model)
    if manifest is not None:
        attach(model, describe(model, dataclasses.replace(manifest.config, router="fitted")))
    return model


def _load_router(layer: RoutedExperts, weight_ED: Tensor, bias_E: Tensor) -> None:
    layer.router.weight.copy_(weight_ED)
    if layer.router.bias is None:
        layer.router.bias = nn.Parameter(bias_E.to(layer.router.weight.dtype))
    else:
        layer.router.bias.copy_(bias_E)
