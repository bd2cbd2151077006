"""Selection rules of other methods, written so that tau moves each of them the way it moves ours.

Every rule maps router outputs ``[T, E]`` and a 0-d tau in (0, 1] to a bool mask ``[T, E]``: tau = 1 activates every
expert, a larger tau never drops one, and one value of tau is what the method's authors publish. So ``set_tau``,
``set_sparsity``, the sparsity controller and the phases of a training run serve all of them. None waits for the device,
and torch.compile traces them with the layers that select by them.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_share(scores_TE: Tensor, tau: Tensor) -> Tensor:
    """The ``k = round(tau * E)`` best experts of every token, at least one; ties by lower index (MoEfication)."""
    E = scores_TE.shape[-1]
    k = (tau * E).round().clamp_min(1)
    order_TE = scores_TE.sort(dim=-1, descending=True, stable=True).indices
    ranked_TE = (torch.arange(E, device=scores_TE.device) < k).expand_as(order_TE)
    return torch.zeros_like(ranked_TE).scatter(-1, order_TE, ranked_TE)


def above_threshold(scores_TE: Tensor, tau: Tensor) -> Tensor:
    """Every expert with ``sigmoid(score) > 1 - tau``, possibly none; LTE's threshold is tau = 0.5.

    Compared as scores, where neither end of the sigmoid runs out of float32.
    """
    threshold = ((1 - tau) / tau).log()  # of one logarithm, so that tau = 0.5 gives exactly 0 in compiled code too
    # Negated, so that NaN counts as active and shows in the output; tau = 1 gives minus infinity.
    return ~((scores_TE <= threshold) & (tau < 1.0))


def near_largest(norms_TE: Tensor, tau: Tensor) -> Tensor:
    """Every expert whose predicted norm is at least ``1 - tau`` times the token's largest (D2DMoE).

    The tau of D2DMoE's released code; that of its paper is ``1 - tau``.

    Args:
        norms_TE: predictions, none negative.
        tau: in (0, 1].
    """
    return ~(norms_TE < (1 - tau) * norms_TE.amax(-1, keepdim=True))


def cumulative_share(norms_TE: Tensor, tau: Tensor) -> Tensor:
    """The largest predicted norms until their share of the token's sum reaches tau, the crossing one included.

    The other rule of D2DMoE's released code. Like our own selection, with shares of norms for probabilities. A token
    whose norms are all 0 gets every expert.
    """
    ranked_TE, order_TE = norms_TE.sort(dim=-1, descending=True, stable=True)
    total_T1 = ranked_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(ranked_TE.dtype).tiny)
    through_TE = (ranked_TE / total_T1).cumsum(-1)
    before_TE = torch.cat([torch.zeros_like(through_TE[..., :1]), through_TE[..., :-1]], dim=-1)
    inactive_TE = (before_TE >= tau) & (tau < 1.0)
    return torch.zeros_like(inactive_TE).scatter(-1, order_TE, ~inactive_TE)
