"""Turning modules into sparse layers and back, in place: by swapping their class.

Shapes: F neurons.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prunepath.config import SparsifyConfig
from torch_prunepath.layer import ExpertsSpec, RoutedExperts, SparseFFN, is_sparse
from torch_prunepath.layer.ffn import FFNView, weight_out_in
from torch_prunepath.layer.handoff import Handoff
from torch_prunepath.layer.norms import forget_norms
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.sparse import Knot, SparseDown, SparseUp, bases_of, sparse_class


@dataclass(frozen=True)
class Swap:
    """What becomes of one dense FFN.

    Attributes:
        view: the dense FFN.
        experts: how it routes.
        router: ``Router(D, E)``.
        order_F: the permutation that brings its neurons into expert order.
        tau: in (0, 1].
        budget: how much of the model's tau this layer takes part in; see :func:`torch_prunepath.sparsity.layer_tau`.
        made_with: the configuration that experts and router were made with.
        path: what :func:`torch_prunepath.set_budget` measured, if it did.
    """

    view: FFNView
    experts: ExpertsSpec
    router: Router
    order_F: Tensor
    tau: float
    budget: float
    made_with: SparsifyConfig
    path: tuple[Knot, ...] | None = None


def make_routed(swap: Swap) -> RoutedExperts:
    """Turn a dense FFN, whose neurons are already in expert order, into a sparse one, in place."""
    view, experts, spec = swap.view, swap.experts, swap.view.spec
    site = view.up if spec.split else view.owner
    device = weight_out_in(view.up).device
    site.__class__ = sparse_class(type(site), SparseUp if spec.split else SparseFFN)  # type: ignore[arg-type]
    assert isinstance(site, RoutedExperts)
    site.ffn, site.experts, site.budget, site.made_with = spec, experts, swap.budget, swap.made_with
    site.path, site.routing_hooks = swap.path, OrderedDict()
    site.router = swap.router
    site.register_buffer("tau", torch.tensor(swap.tau, dtype=torch.float32, device=device), persistent=False)
    for theta in ("theta_x", "theta_h"):
        site.register_buffer(theta, torch.zeros((), dtype=torch.float32, device=device), persistent=False)
    site.register_buffer("permutation", swap.order_F.to(device=device, dtype=torch.int32))
    if isinstance(site, SparseFFN):
        site.projection_types = tuple(
            {type(module) for module in (view.up, view.gate, view.down) if module is not None}
        )
    if isinstance(site, SparseUp):
        site.handoff = handoff = Handoff()
        view.down.__class__ = sparse_class(type(view.down), SparseDown)  # type: ignore[arg-type]
        view.down.handoff, view.down.expert_size = handoff, experts.expert_size  # type: ignore[assignment]
    return site


def make_all_routed(swaps: Sequence[Swap]) -> None:
    """Permute dense FFNs and make them sparse, one after the other, in place; needs the memory of one more layer.

    If it cannot finish, or is interrupted, every FFN is as it was.
    """
    done: list[Swap] = []
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for swap in swaps:
            originals = [(parameter, parameter.data) for parameter in swap.view.parameters()]
            swap.view.permute_(swap.order_F)
            make_routed(swap)
            done.append(swap)
    except BaseException:
        for swap in swaps:
            make_dense(swap.view)
        for swap in done:
            swap.view.unpermute_(swap.order_F)
        # The FFN that was in hand, whatever had happened to it.
        for parameter, data in originals:
            parameter.data = data
        raise


# What make_routed and its users put into a module, and make_dense takes out again.
_ROUTED_STATE = (
    "router", "tau", "theta_x", "theta_h", "permutation", "ffn", "experts", "budget", "made_with", "path",
    "routing_hooks", "recorders", "neuron_recorders", "selection", "projection_types", "packs", "handoff",
)  # fmt: skip
_DOWN_STATE = ("handoff", "expert_size", "neuron_recorders")


def make_dense(view: FFNView) -> None:
    """Undo :func:`make_routed`, in place, also one that was interrupted. Neurons stay in expert order."""
    site = view.up if view.spec.split else view.owner
    for module, names in ((site, _ROUTED_STATE), (view.down, _DOWN_STATE)):
        if not is_sparse(module):
            continue
        for name in names:
            for holder in (module._modules, module._buffers, module.__dict__):
                holder.pop(name, None)
        forget_norms(module)
        module._non_persistent_buffers_set.difference_update(names)
        module.__class__ = bases_of(type(module))[0]
