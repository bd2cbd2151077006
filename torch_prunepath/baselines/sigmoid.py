"""LTE, Learn-To-be-Efficient (Zheng et al., arXiv 2402.06126): sigmoid routers, trained in two stages.

Stage 1: every expert is computed and weighed by ``G = sigmoid(router(x))``; besides the task, ``G^2`` is made small (an
efficiency loss) and ``|G - 0.5|`` large (a separation loss). Stage 2: routers are frozen; an expert is active iff
``G > 0.5``, and counts in full; the model adapts to that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_prunepath.baselines.routed import RoutedBaseline, convert
from torch_prunepath.baselines.routers import linear
from torch_prunepath.baselines.rules import above_threshold
from torch_prunepath.config import num_experts
from torch_prunepath.discover import Which
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router
from torch_prunepath.sparsity import set_tau

PUBLISHED_TAU = 0.5
"""The tau at which an expert is active iff G > 0.5."""


class LTE(RoutedBaseline):
    """Sigmoid routers. An expert is active iff ``G > 1 - tau``: tau = 0.5 is the paper's, others move the sparsity.

    Unlike other rules, a token may end up without any expert. ``LTE(model, None)`` takes hold of a model that
    :func:`lte` made before.
    """

    def start_first_stage(self) -> None:
        """Compute every expert, weighed by its G; routers are trained."""
        self.set_gate("sigmoid")
        self.freeze_routers(False)
        set_tau(self.model, 1.0)

    def start_second_stage(self) -> None:
        """Compute the experts with G > 0.5, unweighed; routers are frozen."""
        self.set_gate("one")
        self.freeze_routers()
        set_tau(self.model, PUBLISHED_TAU)


def lte(
    model: nn.Module,
    *,
    expert_size: int = 32,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> LTE:
    """Give a dense model LTE's routers, in place, ready for the first stage.

    Experts are balanced k-means clusters of gate (or else up) rows; routers are linear, without bias, and start as
    ``nn.Linear`` does.

    Args:
        model: a dense model.
        expert_size: S.
        seed: of clustering and routers.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: if nothing can be converted. The model is as it was.

    Example::

        handle = lte(model)
        first, second = recipes.lte_stages(steps=1000)
        train(model, batches, first)
        handle.start_second_stage()
        train(model, batches, second)
        handle.set_sparsity(0.8, batches)
    """
    generator = torch.Generator().manual_seed(seed)

    def build(view: FFNView, x_ND: Tensor | None) -> Router:
        experts = num_experts(view.spec.ffn_size, expert_size)
        device = view.down_FD.device
        return linear(view.spec.hidden_size, experts, bias=False, device=device, generator=generator)

    convert(model, expert_size, build, above_threshold, seed=seed, include=include, exclude=exclude, progress=progress)
    handle = LTE(model, None)
    handle.start_first_stage()
    return handle
