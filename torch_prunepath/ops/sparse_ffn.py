"""A whole sparse FFN as one operator, for inference: the ``prunepath`` backend puts it in place of the four of ``ops``.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.operators import expert_down, expert_up, register_cuda, router_scores, select_experts
from torch_prunepath.select import sigmoid_gates


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
    normalise: bool = False,
    shared: int = 0,
) -> Tensor:
    """``sum over active e of g_e * FFN_e(x)``, plus the bias of down once.

    The same as ``expert_down(expert_up(x, mask), mask, gates)`` with ``mask = select_experts(router_scores(x), tau)``.
    It has no gradient.

    Args:
        x_TD: ``[T, D]``.
        router_ED: router weight ``[E, D]``, any floating dtype.
        router_bias_E: ``[E]`` or None.
        tau: 0-d float32, read on its device.
        rule: ``"reach"`` or ``"below"``.
        gate_offset: the experts' gates are ``sigmoid(score + gate_offset)``; None: they are 1.
        up_FD: rows ``[F, D]`` in the dtype of ``x_TD``.
        up_bias_F: ``[F]`` or None.
        gate_FD: as ``up_FD``, or None for a plain FFN.
        gate_bias_F: ``[F]`` or None.
        down_FD: rows ``[F, D]`` in the dtype of ``x_TD``.
        down_bias_D: ``[D]`` or None.
        activation: key of ``ACTIVATIONS``.
        expert_size: S.
        normalise: whether the router reads ``x`` divided by its root mean square.
        shared: the first so many experts are active whatever their scores, with gate 1.

    Returns:
        ``[T, D]`` in the dtype of ``x_TD``.
    """
    scores_TE = router_scores(x_TD, router_ED, router_bias_E, normalise)
    mask_TE = select_experts(scores_TE, tau, rule, shared)
    gates_TE = None if gate_offset is None else sigmoid_gates(scores_TE, gate_offset, shared)
    h_TF = expert_up(x_TD, mask_TE, up_FD, up_bias_F, gate_FD, gate_bias_F, activation, expert_size)
    return expert_down(h_TF, mask_TE, gates_TE, down_FD, down_bias_D, expert_size)


sparse_ffn.register_kernel("cpu")(cpu.routed_ffn)


@sparse_ffn.register_fake
def _(  # type: ignore[no-untyped-def]
    x_TD,
    router_ED,
    router_bias_E,
    tau,
    rule,
    gate_offset,
    up_FD,
    up_bias_F,
    gate_FD,
    gate_bias_F,
    down_FD,
    down_bias_D,
    activation,
    expert_size,
    normalise=False,
    shared=0,
):
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


register_cuda(sparse_ffn, "sparse_ffn")
