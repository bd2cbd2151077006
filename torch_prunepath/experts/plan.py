"""Planning what ``sparsify`` makes of each layer: its order of neurons, its router, and its cost of sparsity.

The model is only read.

Shapes: N calibration tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_prunepath.config import SparsifyConfig, num_experts
from torch_prunepath.experts.budget import CURVE_TOKENS, Curve, cost_curve, fisher_information
from torch_prunepath.experts.fit import centroid_init, fitted_router
from torch_prunepath.experts.partition import largest_contributions, partition
from torch_prunepath.inputs.data import Inputs
from torch_prunepath.inputs.visit import check_reached, visit_inputs
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router
from torch_prunepath.progress import progress_bar

PARTITION_TOKENS = 4096
"""Largest number of tokens whose activations decide which neurons form an expert. A guess."""


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer.

    Attributes:
        order_F: permutation of the neurons that forms the experts, shared experts first.
        router: the router with its initial weights.
        curve: cost of giving up router mass; None with ``budget="uniform"``.
    """

    order_F: Tensor
    router: Router
    curve: Curve | None


def plan_layers(
    model: nn.Module, views: Sequence[FFNView], config: SparsifyConfig, inputs: Inputs | None, progress: bool
) -> dict[str, LayerPlan]:
    """Plan every layer, by its name."""
    plans: dict[str, LayerPlan] = {}
    fisher: dict[str, Tensor] = {}
    if config.budget == "sensitivity":
        assert inputs is not None
        check_reached(model, views, inputs)
        fisher = fisher_information(model, views, inputs, seed=config.seed, progress=progress)
    with progress_bar(total=len(views), desc="building experts", unit="layer", progress=progress) as bar:

        def plan(view: FFNView, x_ND: Tensor | None) -> None:
            plans[view.site] = _plan_layer(view, x_ND, config, fisher.pop(view.site, None))
            bar.update()

        if inputs is None:
            for view in views:
                plan(view, None)
        else:
            visit_inputs(model, views, inputs, plan)
    return plans


@torch.no_grad()
def _plan_layer(view: FFNView, x_ND: Tensor | None, config: SparsifyConfig, fisher_DD: Tensor | None) -> LayerPlan:
    size = config.expert_size
    h_NF = None if x_ND is None else view.hidden(x_ND)
    order_F = _order(view, h_NF, config).to(view.down_FD.device)
    weight_ED, bias_E = _start_router(view, order_F, x_ND, h_NF, config)
    dtype = view.down_FD.dtype
    bias_E = None if bias_E is None else bias_E.to(dtype)
    router = Router.of(weight_ED.to(dtype), bias_E, router_norm=config.router_norm)
    curve = None
    if fisher_DD is not None:
        assert x_ND is not None and h_NF is not None
        some = slice(None, None, -(-x_ND.shape[0] // CURVE_TOKENS))
        h_NF, scores_NE = h_NF[some][:, order_F], router(x_ND[some])
        rows_FD, shared = view.down_FD[order_F], config.num_shared(view.spec.ffn_size)
        curve = cost_curve(h_NF, rows_FD, scores_NE, fisher_DD, size, config.rule, shared)
    return LayerPlan(order_F, router, curve)


def _order(view: FFNView, h_NF: Tensor | None, config: SparsifyConfig) -> Tensor:
    """Compute the permutation that forms the experts, shared experts first."""
    contributions = first_N = None
    shared = config.num_shared(view.spec.ffn_size)
    if h_NF is not None and (config.partition == "coactivation" or shared):
        sample_TF = h_NF[:: -(-h_NF.shape[0] // PARTITION_TOKENS)].float()
        contributions = sample_TF.abs() * view.down_FD.float().norm(dim=-1)
    if shared:
        assert contributions is not None
        first_N = largest_contributions(contributions, shared * config.expert_size)
    return partition(config.partition, view, contributions, config.expert_size, config.seed, first_N=first_N)


def _start_router(
    view: FFNView, order_F: Tensor, x_ND: Tensor | None, h_NF: Tensor | None, config: SparsifyConfig
) -> tuple[Tensor, Tensor | None]:
    size = config.expert_size
    if config.router == "centroid":
        return centroid_init(view, order_F, size), None
    if config.router == "zero":
        return view.up_FD.new_zeros(num_experts(view.spec.ffn_size, size), view.spec.hidden_size), None
    assert x_ND is not None and h_NF is not None
    shared = config.num_shared(view.spec.ffn_size)
    return fitted_router(x_ND, h_NF[:, order_F], view.down_FD[order_F], size, config.router_norm, shared)
