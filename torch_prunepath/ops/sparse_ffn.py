"""A whole sparse FFN as one operator, for inference: the ``prunepath`` backend puts it in place of the four of ``ops``.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.operators import expert_down, expert_up, register_cuda, router_scores, select_experts
from torch_prunepath.select import sigmoid_weights
from torch_prunepath.weights import EVERYTHING, FFNWeights, Selector, Thresholds


@torch.library.custom_op("prunepath::sparse_ffn", mutates_args=())
def sparse_ffn(
    x_TD: Tensor,
    router_ED: Tensor,
    router_bias_E: Tensor | None,
    tau: Tensor,
    rule: str,
    gate_offset: float | None,
    up_FD: Tensor,
    up_bias_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_bias_F: Tensor | None,
    down_FD: Tensor,
    down_bias_D: Tensor | None,
    activation: str,
    expert_size: int,
    router_norm: bool = False,
    shared: int = 0,
    theta_x: Tensor | None = None,
    column_norm_D: Tensor | None = None,
    theta_h: Tensor | None = None,
    row_norm_F: Tensor | None = None,
) -> Tensor:
    """Sum over the active experts of ``w_e * FFN_e(x)``, plus the bias of down once.

    It is ``expert_down(expert_up(x, mask), mask, weights)`` with ``mask = select_experts(router_scores(x), tau)``, and
    has no gradient.

    Args:
        x_TD: ``[T, D]``.
        router_ED: router weight ``[E, D]``, any floating dtype.
        router_bias_E: ``[E]`` or None.
        tau: 0-d float32, read on its device.
        rule: ``"reach"`` or ``"below"``.
        gate_offset: the weight of an expert's output is ``sigmoid(score + gate_offset)``; None: it is 1.
        up_FD: rows ``[F, D]`` in the dtype of ``x_TD``.
        up_bias_F: ``[F]`` or None.
        gate_FD: as ``up_FD``, or None for a plain FFN.
        gate_bias_F: ``[F]`` or None.
        down_FD: rows ``[F, D]`` in the dtype of ``x_TD``.
        down_bias_D: ``[D]`` or None.
        activation: key of ``ACTIVATIONS``.
        expert_size: S.
        router_norm: whether the router reads ``x`` divided by its root mean square.
        shared: the first so many experts are active whatever their scores, with weight 1.
        theta_x: as for ``expert_up``.
        column_norm_D: as for ``expert_up``.
        theta_h: as for ``expert_down``.
        row_norm_F: as for ``expert_down``.

    Returns:
        ``[T, D]`` in the dtype of ``x_TD``.
    """
    scores_TE = router_scores(x_TD, router_ED, router_bias_E, router_norm)
    mask_TE = select_experts(scores_TE, tau, rule, shared)
    weights_TE = None if gate_offset is None else sigmoid_weights(scores_TE, gate_offset, shared)
    up = (up_FD, up_bias_F, gate_FD, gate_bias_F)
    h_TF = expert_up(x_TD, mask_TE, *up, activation, expert_size, theta_x, column_norm_D)
    return expert_down(h_TF, mask_TE, weights_TE, down_FD, down_bias_D, expert_size, theta_h, row_norm_F)


def arguments(
    x_TD: Tensor,
    selector: Selector,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    thresholds: Thresholds = EVERYTHING,
) -> tuple[Any, ...]:
    """The arguments of the operator, in its order, from values."""
    *chosen_by, router_norm, shared = selector
    how = (activation, expert_size, router_norm, shared)
    return x_TD, *chosen_by, *weights, *how, *thresholds.parts


def values(*args: Any) -> tuple[Tensor, Selector, FFNWeights, str, int, Thresholds]:
    """The inverse of :func:`arguments`: what implementations take. Arguments that have a default may be missing."""
    x_TD, chosen_by, weights, (activation, expert_size, *how) = args[0], args[1:6], args[6:12], args[12:]
    selector = Selector(*chosen_by, *how[:2])
    return x_TD, selector, FFNWeights(*weights), activation, expert_size, Thresholds.of(*how[2:])


@sparse_ffn.register_kernel("cpu")
def _(*args: Any) -> Tensor:
    return cpu.sparse_ffn(*values(*args))


@sparse_ffn.register_fake
def _(x_TD: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


register_cuda(sparse_ffn, "sparse_ffn", values)
