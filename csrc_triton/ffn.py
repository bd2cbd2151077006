"""A whole sparse FFN: which kernels serve how many tokens.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.csrc_triton import UNION_TOKENS
from torch_prunepath.csrc_triton.down import column_blocks, down
from torch_prunepath.csrc_triton.jit import beside
from torch_prunepath.csrc_triton.linear import linears as linears
from torch_prunepath.csrc_triton.masked import activate_masked_
from torch_prunepath.csrc_triton.order import list_experts, workspace
from torch_prunepath.csrc_triton.rank import rank
from torch_prunepath.csrc_triton.router import late_norm, router_one, router_split
from torch_prunepath.csrc_triton.select import select_experts as select_experts
from torch_prunepath.csrc_triton.select import select_weights
from torch_prunepath.csrc_triton.up import up
from torch_prunepath.rms import inverse_rms
from torch_prunepath.select import keep_counted
from torch_prunepath.weights import EVERYTHING, FFNWeights, Selector, Threshold, Thresholds, UpWeights

RANK_PAIRS = 8_000_000
"""Most pairs of experts, over all tokens, for which selection compares all scores; beyond, it searches. A single token
always compares: that also lists its experts. Comparing was faster wherever it was tried on an H100, up to
5.6 million pairs (docs/log.md, "whole models decoding on an H100"); where that ends was not measured."""


def router_scores(x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, router_norm: bool = False) -> Tensor:
    """Router scores, as :func:`torch_prunepath.ops.router_scores`."""
    if x_TD.dtype == router_ED.dtype and x_TD.dtype in (torch.bfloat16, torch.float16) and x_TD.is_cuda:
        # Products of two half precision numbers are exact in float32: the same as casting both first.
        scores_TE = torch.mm(x_TD, router_ED.t(), out_dtype=torch.float32)
    elif router_norm:
        scores_TE = nnf.linear(x_TD.float(), router_ED.float())
    else:
        bias_E = None if router_bias_E is None else router_bias_E.float()
        return nnf.linear(x_TD.float(), router_ED.float(), bias_E)
    if router_norm:
        scores_TE *= inverse_rms(x_TD)
    return scores_TE if router_bias_E is None else scores_TE + router_bias_E.float()


def compares(tokens: int, experts: int) -> bool:
    """Whether so many tokens select by comparing all scores with all."""
    return tokens == 1 or tokens * experts**2 <= RANK_PAIRS


def sparse_ffn(
    x_TD: Tensor,
    selector: Selector,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    thresholds: Thresholds = EVERYTHING,
) -> Tensor:
    """A whole sparse FFN, as :func:`torch_prunepath.ops.sparse_ffn.sparse_ffn`."""
    T = len(x_TD)
    if T == 0:
        return torch.empty_like(x_TD)
    if T > UNION_TOKENS:
        return _many_tokens(x_TD, selector, weights, activation, expert_size, thresholds)
    router_ED, router_bias_E, tau, rule, gate_offset, router_norm, shared = selector
    work = workspace(router_ED.shape[0], column_blocks(*x_TD.shape), x_TD.device)
    late = late_norm(x_TD, router_bias_E) if router_norm and T > 1 else None
    if T == 1:
        parts_PTE = router_one(x_TD, router_ED, router_bias_E, work, router_norm)
    else:
        parts_PTE = router_split(x_TD, router_ED, router_bias_E, work, late)
    if compares(T, router_ED.shape[0]):
        mask_TE, weights_TE = rank(parts_PTE, tau, rule, gate_offset, work, late, shared)
    else:
        mask_TE, weights_TE = select_weights(parts_PTE, tau, rule, gate_offset, work.used_E, late, shared)
    factors_TE = None if gate_offset is None else weights_TE
    # For one token nothing is lost by storing sums as they are.
    dtype = torch.float32 if T == 1 else x_TD.dtype
    h_TF = torch.empty(T, weights.up_FD.shape[0], dtype=dtype, device=x_TD.device)
    up(x_TD, mask_TE, factors_TE, weights.up_part, activation, expert_size, work, h_TF, thresholds)
    return down(h_TF, work, weights.down_FD, weights.down_bias_D, expert_size, x_TD.dtype, early=T == 1)


def _many_tokens(
    x_TD: Tensor,
    selector: Selector,
    weights: FFNWeights,
    activation: str,
    expert_size: int,
    thresholds: Thresholds,
) -> Tensor:
    """:func:`sparse_ffn` by dense products of all neurons, the router beside them."""
    router_ED, router_bias_E, tau, rule, gate_offset, router_norm, shared = selector
    with beside(x_TD) as join:
        scores_PTE = router_scores(x_TD, router_ED, router_bias_E, router_norm).unsqueeze(0)
        mask_TE, weights_TE = select_weights(scores_PTE, tau, rule, gate_offset, shared=shared)
    up_TF, gate_TF = weights.up_part.project(keep_counted(x_TD, thresholds.inputs))
    join()
    h_TF = activate_masked_(up_TF, gate_TF, mask_TE, weights_TE, activation, expert_size, thresholds.neurons)
    return nnf.linear(h_TF, weights.down_FD.t(), weights.down_bias_D)


def expert_up(
    x_TD: Tensor,
    mask_TE: Tensor,
    weights: UpWeights,
    activation: str,
    expert_size: int,
    inputs: Threshold | None = None,
) -> Tensor:
    """Hidden activations of active experts, as :func:`torch_prunepath.ops.expert_up`."""
    mask_TE = mask_TE.contiguous()
    if 0 < x_TD.shape[0] <= UNION_TOKENS:
        work = workspace(mask_TE.shape[1], 0, x_TD.device)
        list_experts(mask_TE, work)
        h_TF = x_TD.new_zeros(x_TD.shape[0], weights.up_FD.shape[0])
        up(x_TD, mask_TE, None, weights, activation, expert_size, work, h_TF, Thresholds(inputs))
        return h_TF
    projected = weights.project(keep_counted(x_TD, inputs))
    return activate_masked_(*projected, mask_TE, None, activation, expert_size)


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
    mask_TE = mask_TE.contiguous()
    weights_TE = None if weights_TE is None else weights_TE.float().contiguous()
    h_TF = activate_masked_(h_TF.clone(), None, mask_TE, weights_TE, "none", expert_size, neurons)
    if not 0 < h_TF.shape[0] <= UNION_TOKENS:
        return nnf.linear(h_TF, down_FD.t(), down_bias_D)
    work = workspace(mask_TE.shape[1], column_blocks(h_TF.shape[0], down_FD.shape[1]), h_TF.device)
    list_experts(mask_TE, work)
    return down(h_TF, work, down_FD, down_bias_D, expert_size, h_TF.dtype, early=False)
