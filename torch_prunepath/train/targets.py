"""The targets that a sparse layer is trained towards, computed densely from its own experts and without gradient.

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
    """Share of each routed expert in the contribution norm of them all: float32 ``[N, E - shared]``.

    Rows sum to 1, or are 0. Under autocast the hidden activations are computed in its dtype, the norms in float32.
    """
    h_NF = view.hidden(x_ND)
    with torch.autocast(x_ND.device.type, enabled=False):
        return contribution_shares(h_NF, view.down_FD, expert_size, shared)


@torch.no_grad()
def dense_output(view: FFNView, x_ND: Tensor | None) -> Tensor:
    """Output of the FFN with every expert active, all gates 1 and no dropout: ``[N, D] -> [N, D]``."""
    assert x_ND is not None, "the call has no input"
    h_NF = view.hidden(x_ND)
    bias_D = view.down_bias_D
    return nnf.linear(h_NF, view.down_FD.t().to(h_NF.dtype), None if bias_D is None else bias_D.to(h_NF.dtype))


def sample_start(seed: str) -> Tensor:
    """Draw the place where :func:`sample_tokens` begins: 0-d int64, the same for the same seed."""
    return torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed_of(seed)))


def sample_tokens(scores_TE: Tensor, tokens: int, start: Tensor) -> Tensor | None:
    """Choose ``tokens`` of a call's tokens: their places, int64 ``[tokens]``, or None if that is all of them.

    They are evenly spaced from ``start`` on and continue at the beginning after the last token.
    """
    total = scores_TE.shape[0]
    if tokens >= total:
        return None
    places_N = torch.arange(tokens, device=scores_TE.device) * total // tokens
    return (places_N + start.to(places_N.device)) % total


def beside_the_layer(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Open a context for computations inside a layer's forward that are not a part of the layer.

    It does two things. Gradient checkpointing runs the layer again without these computations and would then miss the
    tensors that they saved, so these bypass it. And a weight that autocast casts here has no gradient, so the layer
    must not find it in autocast's cache. torch.compile needs neither.
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
    """Return scores, contribution shares and weights of some of a call's tokens.

    Args:
        call: a call that holds its input.
        some_N: which tokens, int64; None for all. Padding among them has weight 0.
        detach: let the scores' gradient reach the router only, not the layers before it.

    Returns:
        Scores ``[N, E]`` with their graph and shares ``[N, E]`` without, both of the routed experts alone; and weights
        ``[N]``, or None if all count alike.
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
