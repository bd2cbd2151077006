"""What a sparse layer is trained towards, computed densely from its own experts, without gradient.

Shapes: N tokens, D hidden size, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.experts.fit import contribution_shares
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.train.schedule import seed_of
from torch_prunepath.train.tape import RoutedCall


@torch.no_grad()
def expert_shares(view: FFNView, x_ND: Tensor, expert_size: int, shared: int = 0) -> Tensor:
    """Each routed expert's share of their contribution norm, float32 ``[N, E - shared]``; rows sum to 1 (or are 0).

    Under autocast the hidden activations are computed in its dtype, the norms in float32.
    """
    h_NF = view.hidden(x_ND)
    with torch.autocast(x_ND.device.type, enabled=False):
        return contribution_shares(h_NF, view.down_FD, expert_size, shared)


@torch.no_grad()
def dense_output(view: FFNView, x_ND: Tensor | None) -> Tensor:
    """What the FFN answers with every expert active and all gates 1, dropouts left out: ``[N, D] -> [N, D]``."""
    assert x_ND is not None, "the call has no input"
    h_NF = view.hidden(x_ND)
    bias_D = view.down_bias_D
    return nnf.linear(h_NF, view.down_FD.t().to(h_NF.dtype), None if bias_D is None else bias_D.to(h_NF.dtype))


def sample_start(seed: str) -> Tensor:
    """Where :func:`sample_tokens` begins, 0-d int64, the same for the same seed."""
    return torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed_of(seed)))


def sample_tokens(scores_TE: Tensor, tokens: int, start: Tensor) -> Tensor | None:
    """Places of ``tokens`` of a call's tokens, evenly spaced from ``start`` on, around the end; None for all."""
    total = scores_TE.shape[0]
    if tokens >= total:
        return None
    places_N = torch.arange(tokens, device=scores_TE.device) * total // tokens
    return (places_N + start.to(places_N.device)) % total


def beside_the_layer(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What is computed inside a layer's forward without being a part of it.

    Gradient checkpointing would miss tensors saved here when it runs the layer again without this: they bypass it.
    And a weight that autocast casts here, without gradient, must not be what the layer itself finds in the cache.
    torch.compile needs neither: it has no such cache, and what it saves is a matter between it and its backward pass.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _beside(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    kind = device.type
    with (
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
        torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ),
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def fit_sample(call: RoutedCall, some_N: Tensor | None, detach: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, contribution shares and weights of some of a call's tokens.

    Args:
        call: with its input.
        some_N: which tokens, int64; None for all. Padding among them has weight 0.
        detach: let the scores' gradient reach the router only, not what computed its input.

    Returns:
        ``[N, E]`` with graph, ``[N, E]`` without, both of the routed experts alone, and ``[N]`` or None.
    """
    assert call.x_TD is not None, "the call has no input"
    x_ND, scores_NE, weight_N = call.x_TD, call.scores_TE, call.weight_T
    if some_N is not None:
        x_ND, scores_NE = x_ND[some_N], scores_NE[some_N]
        weight_N = None if weight_N is None else weight_N[some_N]
    if detach:
        scores_NE = call.layer.router(x_ND.detach())
    experts = call.layer.experts
    shares_NE = expert_shares(call.view, x_ND.detach(), experts.expert_size, experts.shared)
    return call.layer.routed(scores_NE), shares_NE, weight_N
