"""The router: one linear map from a token to the scores of the experts.

Shapes: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torch_prunepath.ops.operators import router_scores
from torch_prunepath.ops.transforms import transformable


class Router(nn.Linear):
    """``nn.Linear(D, E)`` that computes and answers in float32, whatever its weights are stored in.

    Attributes:
        router_norm: whether each token is read divided by its root mean square.
    """

    router_norm: bool = False

    @classmethod
    def of(cls, router_ED: Tensor, router_bias_E: Tensor | None, *, router_norm: bool = False) -> Router:
        """Make a router of these weights, in their dtype and on their device."""
        experts, hidden = router_ED.shape
        router = cls(hidden, experts, bias=router_bias_E is not None, device="meta")
        router.router_norm = router_norm
        router.weight = nn.Parameter(router_ED.contiguous())
        if router_bias_E is not None:
            router.bias = nn.Parameter(router_bias_E)
        return router

    def forward(self, x: Tensor) -> Tensor:
        """Scores, float32: ``[..., D] -> [..., E]``."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE = transformable(router_scores)(x_TD, self.weight, self.bias, self.router_norm)
        return scores_TE.view(*x.shape[:-1], scores_TE.shape[-1])

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return super().extra_repr() + (", router_norm=True" if self.router_norm else "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The name under which models that were pickled before it changed have the setting.
        state = dict(state)
        if "normalise" in state:
            state["router_norm"] = state.pop("normalise")
        super().__setstate__(state)
