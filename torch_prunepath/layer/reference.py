"""The sparse FFN as anyone can read it: fp32 (or fp64), token by token, expert by expert. The oracle of the tests.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.config import num_experts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.rms import EPSILON


def select_reference(scores: list[float], tau: float, rule: str = "reach", shared: int = 0) -> list[bool]:
    """The selection of one token in plain Python, from the definition."""
    if shared:
        return [True] * shared + select_reference(scores[shared:], tau, rule)
    if tau >= 1.0:
        return [True] * len(scores)
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0).tolist()
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))
    active = [False] * len(p)
    mass = 0.0
    for rank, e in enumerate(order):
        crossing = mass if rule == "reach" else mass + p[e]
        if rank == 0 or crossing < tau:
            active[e] = True
        mass += p[e]
    return active


def router_scores_reference(
    x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, router_norm: bool = False
) -> Tensor:
    """Router scores in float64, token by token; with ``router_norm``, tokens are divided by their root mean square."""
    router_ED, bias_E = router_ED.double(), None if router_bias_E is None else router_bias_E.double()
    rows = []
    for x_D in x_TD.double():
        if router_norm:
            x_D = x_D / (x_D.square().mean() + EPSILON).sqrt()
        rows.append(router_ED @ x_D if bias_E is None else router_ED @ x_D + bias_E)
    return torch.stack(rows) if rows else x_TD.new_zeros(0, len(router_ED), dtype=torch.float64)


def norms_reference(view: FFNView) -> tuple[Tensor, Tensor]:
    """Norms of the columns of [gate; up], ``[D]``, and of the rows of down, ``[F]``: float64."""
    gate_FD = view.up_FD[:0] if view.gate_FD is None else view.gate_FD
    first = torch.cat([gate_FD, view.up_FD]).double()
    return first.square().sum(0).sqrt(), view.down_FD.double().square().sum(1).sqrt()


def count_reference(values_N: Tensor, norms_N: Tensor, theta: float) -> list[bool]:
    """Which entries of one token's vector count, one by one, from the definition."""
    pairs = zip(values_N.tolist(), norms_N.tolist(), strict=True)
    return [theta == 0 or value != value or abs(value) * norm >= theta for value, norm in pairs]


def sparse_ffn_reference(
    view: FFNView,
    x_TD: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    expert_size: int,
    theta_x: float = 0.0,
    theta_h: float = 0.0,
) -> Tensor:
    """Sum over the active experts, ``y_t = sum_e w_te * FFN_e(x_t)``, plus the down-projection's bias once.

    Args:
        view: the FFN, its neurons already grouped: expert e holds neurons ``e*S`` to ``(e+1)*S - 1``.
        x_TD: input ``[T, D]``, fp32 or fp64; everything is computed in its dtype.
        mask_TE: bool ``[T, E]``.
        weights_TE: weights of the experts' outputs ``[T, E]``, or None for 1.
        expert_size: S.
        theta_x: threshold on inputs, see :mod:`torch_prunepath.select`.
        theta_h: threshold on neurons.

    Returns:
        ``[T, D]`` in the dtype of ``x_TD``.
    """
    dtype, ffn_size = x_TD.dtype, view.spec.ffn_size
    act = ACTIVATIONS[view.spec.activation]

    def rows(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
        return None if tensor is None else tensor[start:stop].to(dtype)

    def affine(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return weight @ x if bias is None else weight @ x + bias

    column_norm_D, row_norm_F = norms_reference(view)
    outputs = []
    for t in range(x_TD.shape[0]):
        y = torch.zeros_like(x_TD[t]) if view.down_bias_D is None else view.down_bias_D.to(dtype).clone()
        x = torch.where(torch.tensor(count_reference(x_TD[t], column_norm_D, theta_x)), x_TD[t], 0)
        for e in range(num_experts(ffn_size, expert_size)):
            if not mask_TE[t, e]:
                continue
            start, stop = e * expert_size, min((e + 1) * expert_size, ffn_size)
            up = rows(view.up_FD, start, stop)
            down = rows(view.down_FD, start, stop)
            gate = rows(view.gate_FD, start, stop)
            assert up is not None and down is not None
            h = affine(up, rows(view.up_bias_F, start, stop), x)
            h = act(h) if gate is None else act(affine(gate, rows(view.gate_bias_F, start, stop), x)) * h
            h = torch.where(torch.tensor(count_reference(h, row_norm_F[start:stop], theta_h)), h, 0)
            expert = h @ down
            y = y + (expert if weights_TE is None else weights_TE[t, e].to(dtype) * expert)
        outputs.append(y)
    return torch.stack(outputs) if outputs else torch.zeros_like(x_TD)
