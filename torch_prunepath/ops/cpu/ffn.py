"""How a CPU computes a sparse FFN: at few tokens only the active experts' rows are read, and they are never copied.

Every call first decides how (:func:`choose`), then does it. The functions that operators call have their names, as in
``csrc_triton.ffn``; they take weights as the values of :mod:`torch_prunepath.weights`.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller), K active experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_prunepath.activations import activate
from torch_prunepath.ops.cpu import dense, rows
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.ops.cpu.packs import linear as packed_linear
from torch_prunepath.ops.cpu.router import router_scores as router_scores
from torch_prunepath.ops.cpu.select import active_experts
from torch_prunepath.ops.cpu.select import select_experts as select_experts
from torch_prunepath.select import keep_counted, sigmoid_weights
from torch_prunepath.weights import EVERYTHING, FFNWeights, Selector, Threshold, Thresholds, UpWeights

# --- how --------------------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """How one call is computed.

    Attributes:
        everything: whether all experts are active for all tokens, so that nothing needs a mask.
        gather_up: whether up and gate are dot products of active rows alone; else they are dense products.
        gather_down: whether down is a sum of active rows alone; else it is a dense product.
        packed_up: a copy of up in oneDNN's order for its dense product, or None.
        packed_gate: a copy of gate likewise, or None.
        packed_down: a copy of down ``[D, F]`` likewise, or None.
    """

    everything: bool
    gather_up: bool
    gather_down: bool
    packed_up: Tensor | None = None
    packed_gate: Tensor | None = None
    packed_down: Tensor | None = None


def choose(
    active: int, shape: tuple[int, int], expert_size: int, weights: FFNWeights, packs: Packs | None = None
) -> How:
    """Decide how to compute an FFN.

    Args:
        active: number of active pairs of a token and an expert.
        shape: (T, E).
        expert_size: S; a smaller last expert counts as if it were whole.
        weights: of the FFN.
        packs: copies of the weights that the call may use; those that it needs are made. None: it uses no copies.
    """
    (tokens, experts), neurons = shape, active * expert_size
    packed_down = None if packs is None else packs.of("down", weights.down_FD.t())
    packs = None if packed_down is None else packs  # no copy of down, no other ones
    gather_up = _dots_pay(neurons, tokens, weights, packs is not None and packs.every)
    gather_down = rows.sums_pay(neurons, tokens, weights.down_FD, packed_down is not None)
    packed_up = packed_gate = None
    if packs is not None and not gather_up:
        packed_gate = None if weights.gate_FD is None else packs.of("gate", weights.gate_FD)
        packed_up = packs.of("up", weights.up_FD)
    return How(active == tokens * experts, gather_up, gather_down, packed_up, packed_gate, packed_down)


def _dots_pay(neurons: int, tokens: int, weights: FFNWeights | UpWeights, packed: bool = False) -> bool:
    """Whether dot products are expected to be faster than dense ones in up and in gate."""
    up_FD, gate_FD = weights.up_FD, weights.gate_FD
    return rows.dots_pay(neurons, tokens, up_FD, packed) and (
        gate_FD is None or rows.dots_pay(neurons, tokens, gate_FD, packed)
    )


# --- halves -----------------------------------------------------------------------------------------------------------


def expert_up(
    x_TD: Tensor,
    mask_TE: Tensor,
    weights: UpWeights,
    activation: str,
    expert_size: int,
    inputs: Threshold | None = None,
) -> Tensor:
    """Hidden activations of active experts, as :func:`torch_prunepath.ops.expert_up`."""
    active, x_TD = int(mask_TE.sum()), keep_counted(x_TD, inputs)
    if _dots_pay(active * expert_size, len(x_TD), weights):
        return _gathered_up(x_TD, mask_TE, weights, activation, expert_size)
    h_TF = _dense_up(x_TD, weights, activation)
    return h_TF if active == mask_TE.numel() else dense.mask_(h_TF, mask_TE, expert_size)


def expert_down(
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    down_FD: Tensor,
    down_bias_D: Tensor | None,
    expert_size: int,
    neurons: Threshold | None = None,
) -> Tensor:
    """Sum of the active experts' outputs, as :func:`torch_prunepath.ops.expert_down`."""
    active = int(mask_TE.sum())
    if rows.sums_pay(active * expert_size, len(h_TF), down_FD):
        return _gathered_down(h_TF, mask_TE, weights_TE, down_FD, down_bias_D, expert_size, neurons)
    if neurons is not None:
        h_TF = dense.mask_(keep_counted(h_TF, neurons), mask_TE, expert_size)
    elif active < mask_TE.numel():
        h_TF = dense.mask_(h_TF.clone(), mask_TE, expert_size)
    elif weights_TE is not None:
        h_TF = h_TF.clone()
    return dense.linear(dense.weigh_(h_TF, weights_TE, expert_size), down_FD.t(), down_bias_D)


def _gathered_up(x_TD: Tensor, mask_TE: Tensor, weights: UpWeights, activation: str, expert_size: int) -> Tensor:
    pairs = rows.find_pairs(mask_TE, expert_size, weights.up_FD)
    return rows.spread_pairs(rows.hidden_of_pairs(x_TD, pairs, weights, activation), pairs, len(weights.up_FD))


def _dense_up(
    x_TD: Tensor,
    weights: UpWeights,
    activation: str,
    packed_up: Tensor | None = None,
    packed_gate: Tensor | None = None,
) -> Tensor:
    """Hidden activation of every neuron, active or not: ``[T, F]``, a tensor of its own."""
    up_TF = _product(x_TD, weights.up_FD, weights.up_bias_F, packed_up)
    gate_TF = None if weights.gate_FD is None else _product(x_TD, weights.gate_FD, weights.gate_bias_F, packed_gate)
    return activate(up_TF, gate_TF, activation, reuse=True)


def _gathered_down(
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    down_FD: Tensor,
    down_bias_D: Tensor | None,
    expert_size: int,
    neurons: Threshold | None = None,
) -> Tensor:
    pairs = rows.find_pairs(mask_TE, expert_size, down_FD)
    h_P = rows.keep_counted_pairs(rows.take_pairs(h_TF, pairs), pairs, neurons)
    return rows.sum_rows(rows.weigh_pairs_(h_P, pairs, weights_TE, expert_size), pairs, down_FD, down_bias_D)


def _product(x_TD: Tensor, weight_oi: Tensor, bias_O: Tensor | None, packed: Tensor | None) -> Tensor:
    """Linear layer ``x W^T + b`` of a weight ``[out, in]``, from its copy if there is one."""
    return dense.linear(x_TD, weight_oi, bias_O) if packed is None else packed_linear(x_TD, packed, bias_O)


# --- whole FFNs -------------------------------------------------------------------------------------------------------


def masked_ffn(
    x_TD: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    packs: Packs | None = None,
    thresholds: Thresholds = EVERYTHING,
) -> Tensor:
    """A sparse FFN whose active experts are given: :func:`expert_down` of :func:`expert_up`.

    Pairs of a token and a neuron are listed once, and hidden activations are not copied.
    """
    how = choose(int(mask_TE.sum()), (len(mask_TE), mask_TE.shape[1]), expert_size, weights, packs)
    x_TD = keep_counted(x_TD, thresholds.inputs)
    return _computed(how, x_TD, mask_TE, weights_TE, weights, activation, expert_size, thresholds.neurons)


def sparse_ffn(
    x_TD: Tensor,
    selector: Selector,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    thresholds: Thresholds = EVERYTHING,
    packs: Packs | None = None,
) -> Tensor:
    """A whole sparse FFN, as :func:`torch_prunepath.ops.sparse_ffn.sparse_ffn`.

    ``packs`` are those of the layer that the weights belong to.
    """
    router_ED, router_bias_E, tau_tensor, rule, gate_offset, router_norm, shared = selector
    tau = float(tau_tensor)
    if packs is not None and (len(x_TD) < 2 or x_TD.dtype != torch.bfloat16 or not packs.count()):
        packs = None
    if gate_offset is None and tau >= 1:
        # Nobody needs the scores.
        mask_TE = torch.ones(len(x_TD), len(router_ED), dtype=torch.bool)
        return masked_ffn(x_TD, mask_TE, None, weights, activation, expert_size, packs, thresholds)
    scores_TE = router_scores(x_TD, router_ED, router_bias_E, router_norm, packs)
    weights_TE = None if gate_offset is None else sigmoid_weights(scores_TE, gate_offset, shared)
    if len(x_TD) != 1:
        mask_TE = select_experts(scores_TE, tau, rule, shared)
        return masked_ffn(x_TD, mask_TE, weights_TE, weights, activation, expert_size, packs, thresholds)
    experts_K = active_experts(scores_TE.view(-1), tau, rule, shared)
    how = choose(len(experts_K), (1, len(router_ED)), expert_size, weights)
    x_TD = keep_counted(x_TD, thresholds.inputs)
    if how.gather_up and how.gather_down:
        pairs = rows.pairs_of_experts(experts_K, expert_size, weights.up_FD)
        return _gathered_ffn(x_TD, pairs, weights_TE, weights, activation, expert_size, thresholds.neurons)
    mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).index_fill_(1, experts_K, True)
    return _computed(how, x_TD, mask_TE, weights_TE, weights, activation, expert_size, thresholds.neurons)


def _computed(
    how: How,
    x_TD: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    neurons: Threshold | None,
) -> Tensor:
    """What :func:`masked_ffn` answers, computed as it was decided, of tokens whose uncounted inputs are 0 already."""
    if how.gather_up and how.gather_down:
        pairs = rows.find_pairs(mask_TE, expert_size, weights.up_FD)
        return _gathered_ffn(x_TD, pairs, weights_TE, weights, activation, expert_size, neurons)
    if how.gather_up:
        h_TF = _gathered_up(x_TD, mask_TE, weights.up_part, activation, expert_size)
    else:
        h_TF = _dense_up(x_TD, weights.up_part, activation, how.packed_up, how.packed_gate)
        if not how.everything:
            dense.mask_(h_TF, mask_TE, expert_size)
    if how.gather_down:
        down = (weights.down_FD, weights.down_bias_D, expert_size)
        return _gathered_down(h_TF, mask_TE, weights_TE, *down, neurons)
    h_TF = dense.weigh_(keep_counted(h_TF, neurons), weights_TE, expert_size)
    return _product(h_TF, weights.down_FD.t(), weights.down_bias_D, how.packed_down)


def _gathered_ffn(
    x_TD: Tensor,
    pairs: rows.Pairs,
    weights_TE: Tensor | None,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    neurons: Threshold | None,
) -> Tensor:
    h_P = rows.hidden_of_pairs(x_TD, pairs, weights.up_part, activation)
    h_P = rows.keep_counted_pairs(h_P, pairs, neurons)
    h_P = rows.weigh_pairs_(h_P, pairs, weights_TE, expert_size)
    return rows.sum_rows(h_P, pairs, weights.down_FD, weights.down_bias_D)
