"""How a CPU computes a sparse FFN: at few tokens only the active experts' rows are read, and they are never copied.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller), K active experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prunepath.config import Rule
from torch_prunepath.ops.cpu import dense, rows
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.ops.cpu.packs import linear as packed_linear
from torch_prunepath.ops.cpu.select import active_experts, mask_of_tokens
from torch_prunepath.select import sigmoid_gates


def expert_up(
    x_TD: Tensor,
    mask_TE: Tensor,
    up_FD: Tensor,
    up_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_F: Tensor | None,
    activation: str,
    expert_size: int,
) -> Tensor:
    """:func:`torch_prunepath.ops.expert_up` on a CPU."""
    return _hidden(x_TD, mask_TE, int(mask_TE.sum()), up_FD, up_F, gate_FD, gate_F, activation, expert_size)


def _hidden(
    x_TD: Tensor,
    mask_TE: Tensor,
    active: int,
    up_FD: Tensor,
    up_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_F: Tensor | None,
    activation: str,
    expert_size: int,
    packs: Packs | None = None,
) -> Tensor:
    if _all_dots_pay(active * expert_size, len(x_TD), up_FD, gate_FD, packs is not None and packs.every):
        pairs = rows.find_pairs(mask_TE, expert_size, up_FD)
        h_P = rows.hidden_of_pairs(x_TD, pairs, up_FD, up_F, gate_FD, gate_F, activation)
        return rows.spread_pairs(h_P, pairs, len(up_FD))
    h_TF = dense.hidden_of_all(x_TD, up_FD, up_F, gate_FD, gate_F, activation, packs)
    return h_TF if active == mask_TE.numel() else dense.mask_(h_TF, mask_TE, expert_size)


def expert_down(
    h_TF: Tensor, mask_TE: Tensor, gates_TE: Tensor | None, down_FD: Tensor, down_D: Tensor | None, expert_size: int
) -> Tensor:
    """:func:`torch_prunepath.ops.expert_down` on a CPU."""
    active, tokens = int(mask_TE.sum()), len(h_TF)
    if rows.sums_pay(active * expert_size, tokens, down_FD):
        return _sum_active(h_TF, mask_TE, gates_TE, down_FD, down_D, expert_size)
    if active < mask_TE.numel():
        h_TF = dense.mask_(h_TF.clone(), mask_TE, expert_size)
    elif gates_TE is not None:
        h_TF = h_TF.clone()
    return dense.linear(dense.scale_(h_TF, gates_TE, expert_size), down_FD.t(), down_D)


def sparse_ffn(
    x_TD: Tensor,
    mask_TE: Tensor,
    gates_TE: Tensor | None,
    up_FD: Tensor,
    up_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_F: Tensor | None,
    down_FD: Tensor,
    down_D: Tensor | None,
    activation: str,
    expert_size: int,
    packs: Packs | None = None,
) -> Tensor:
    """:func:`expert_down` of :func:`expert_up`, with the pairs found once and no copy of the hidden activations."""
    active, tokens = int(mask_TE.sum()), len(x_TD)
    neurons = active * expert_size
    packed_DF = None if packs is None else packs.of("down", down_FD.t())
    packs = None if packed_DF is None else packs
    if _both_pay(neurons, tokens, up_FD, gate_FD, down_FD, packs):
        pairs = rows.find_pairs(mask_TE, expert_size, up_FD)
        weights = up_FD, up_F, gate_FD, gate_F, down_FD, down_D
        return _gathered(x_TD, pairs, gates_TE, *weights, activation, expert_size)
    h_TF = _hidden(x_TD, mask_TE, active, up_FD, up_F, gate_FD, gate_F, activation, expert_size, packs)
    if rows.sums_pay(neurons, tokens, down_FD, packed_DF is not None):
        return _sum_active(h_TF, mask_TE, gates_TE, down_FD, down_D, expert_size)
    h_TF = dense.scale_(h_TF, gates_TE, expert_size)
    return dense.linear(h_TF, down_FD.t(), down_D) if packed_DF is None else packed_linear(h_TF, packed_DF, down_D)


def _all_dots_pay(neurons: int, tokens: int, up_FD: Tensor, gate_FD: Tensor | None, packed: bool = False) -> bool:
    return rows.dots_pay(neurons, tokens, up_FD, packed) and (
        gate_FD is None or rows.dots_pay(neurons, tokens, gate_FD, packed)
    )


def _sum_active(
    h_TF: Tensor, mask_TE: Tensor, gates_TE: Tensor | None, down_FD: Tensor, down_D: Tensor | None, expert_size: int
) -> Tensor:
    pairs = rows.find_pairs(mask_TE, expert_size, down_FD)
    h_P = rows.scale_pairs_(rows.take_pairs(h_TF, pairs), pairs, gates_TE, expert_size)
    return rows.sum_rows(h_P, pairs, down_FD, down_D)


def routed_ffn(
    x_TD: Tensor,
    router_ED: Tensor,
    router_E: Tensor | None,
    tau: Tensor,
    rule: Rule,
    gate_offset: float | None,
    up_FD: Tensor,
    up_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_F: Tensor | None,
    down_FD: Tensor,
    down_D: Tensor | None,
    activation: str,
    expert_size: int,
    normalise: bool = False,
    shared: int = 0,
    packs: Packs | None = None,
) -> Tensor:
    """What :func:`torch_prunepath.ops.sparse_ffn.sparse_ffn` computes, on CPUs.

    ``packs`` are those of the layer that the weights belong to.
    """
    weights = up_FD, up_F, gate_FD, gate_F, down_FD, down_D
    level = float(tau)
    if packs is not None and (len(x_TD) < 2 or x_TD.dtype != torch.bfloat16 or not packs.count()):
        packs = None
    if gate_offset is None and level >= 1:
        # Nobody needs the scores.
        mask_TE = torch.ones(len(x_TD), len(router_ED), dtype=torch.bool)
        return sparse_ffn(x_TD, mask_TE, None, *weights, activation, expert_size, packs)
    scores_TE = dense.scores(x_TD, router_ED, router_E, normalise, packs)
    gates_TE = None if gate_offset is None else sigmoid_gates(scores_TE, gate_offset, shared)
    if len(x_TD) != 1:
        mask_TE = mask_of_tokens(scores_TE, level, rule, shared)
        return sparse_ffn(x_TD, mask_TE, gates_TE, *weights, activation, expert_size, packs)
    experts_K = active_experts(scores_TE.view(-1), level, rule, shared)
    if _both_pay(len(experts_K) * expert_size, 1, up_FD, gate_FD, down_FD):
        pairs = rows.pairs_of_experts(experts_K, expert_size, up_FD)
        return _gathered(x_TD, pairs, gates_TE, *weights, activation, expert_size)
    mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).index_fill_(1, experts_K, True)
    return sparse_ffn(x_TD, mask_TE, gates_TE, *weights, activation, expert_size)


def _both_pay(
    neurons: int,
    tokens: int,
    up_FD: Tensor,
    gate_FD: Tensor | None,
    down_FD: Tensor,
    packs: Packs | None = None,
) -> bool:
    every = packs is not None and packs.every
    return rows.sums_pay(neurons, tokens, down_FD, packs is not None) and _all_dots_pay(
        neurons, tokens, up_FD, gate_FD, every
    )


def _gathered(
    x_TD: Tensor,
    pairs: rows.Pairs,
    gates_TE: Tensor | None,
    up_FD: Tensor,
    up_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_F: Tensor | None,
    down_FD: Tensor,
    down_D: Tensor | None,
    activation: str,
    expert_size: int,
) -> Tensor:
    h_P = rows.hidden_of_pairs(x_TD, pairs, up_FD, up_F, gate_FD, gate_F, activation)
    return rows.sum_rows(rows.scale_pairs_(h_P, pairs, gates_TE, expert_size), pairs, down_FD, down_D)
