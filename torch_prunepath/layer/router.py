"""The router: one linear map from a token to the scores of the experts.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

from torch_prunepath.config import num_experts
from torch_prunepath.ops.operators import router_scores


class Router(nn.Linear):
    """``nn.Linear(D, E)`` that computes and answers in float32, whatever its weights are stored in.

    Attributes:
        normalise: read each token divided by its root mean square.
    """

    normalise: bool = False

    @classmethod
    def of(cls, weight_ED: Tensor, bias_E: Tensor | None, *, normalise: bool = False) -> Router:
        """A router with these weights, in their dtype and on their device."""
        experts, hidden = weight_ED.shape
        router = cls(hidden, experts, bias=bias_E is not None, device="meta")
        router.normalise = normalise
        router.weight = nn.Parameter(weight_ED.contiguous())
        if bias_E is not None:
            router.bias = nn.Parameter(bias_E)
        return router

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., E]``."""
        scores_TE = router_scores(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.normalise)
        return scores_TE.view(*x.shape[:-1], scores_TE.shape[-1])

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return super().extra_repr() + (", normalise=True" if self.normalise else "")


def expert_sums(values_NF: Tensor, expert_size: int) -> Tensor:
    """Sum over each expert's neurons: ``[..., F] -> [..., E]``."""
    experts = num_experts(values_NF.shape[-1], expert_size)
    padded = nnf.pad(values_NF, (0, experts * expert_size - values_NF.shape[-1]))
    return padded.unflatten(-1, (experts, expert_size)).sum(-1)
