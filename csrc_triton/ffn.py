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

RANK_PAIRS = 8_000_000
"""Up to so many pairs of experts over all tokens, selection compares all scores with all; beyond, it searches.
One token always compares: that also lists its experts. Measured on an H100, see docs/log.md."""


def router_scores(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor | None, normalise: bool = False) -> Tensor:
    """See :func:`torch_prunepath.ops.router_scores`."""
    if x_TD.dtype == router_ED.dtype and x_TD.dtype in (torch.bfloat16, torch.float16) and x_TD.is_cuda:
        # Products of two half precision numbers are exact in float32: the same as casting both first.
        scores_TE = torch.mm(x_TD, router_ED.t(), out_dtype=torch.float32)
    elif normalise:
        scores_TE = nnf.linear(x_TD.float(), router_ED.float())
    else:
        return nnf.linear(x_TD.float(), router_ED.float(), None if bias_E is None else bias_E.float())
    if normalise:
        scores_TE *= inverse_rms(x_TD)
    return scores_TE if bias_E is None else scores_TE + bias_E.float()


def compares(tokens: int, experts: int) -> bool:
    """Whether so many tokens select by comparing all scores with all."""
    return tokens == 1 or tokens * experts**2 <= RANK_PAIRS


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
    """See :func:`torch_prunepath.ops.sparse_ffn.sparse_ffn`."""
    up_args = (up_FD, up_bias_F, gate_FD, gate_bias_F, activation, expert_size)
    T, D = x_TD.shape
    if T == 0:
        return torch.empty_like(x_TD)
    if T > UNION_TOKENS:
        with beside(x_TD) as join:
            scores_PTE = router_scores(x_TD, router_ED, router_bias_E, normalise).unsqueeze(0)
            mask_TE, weights_TE = select_weights(scores_PTE, tau, rule, gate_offset, shared=shared)
        pre_TF, gate_TF = _pre(x_TD, *up_args[:4])
        join()
        h_TF = activate_masked_(pre_TF, gate_TF, mask_TE, weights_TE, activation, expert_size)
        return nnf.linear(h_TF, down_FD.t(), down_bias_D)
    work = workspace(router_ED.shape[0], column_blocks(T, D), x_TD.device)
    late = late_norm(x_TD, router_bias_E) if normalise and T > 1 else None
    if T == 1:
        parts_PTE = router_one(x_TD, router_ED, router_bias_E, work, normalise)
    else:
        parts_PTE = router_split(x_TD, router_ED, router_bias_E, work, late)
    if compares(T, router_ED.shape[0]):
        mask_TE, weights_TE = rank(parts_PTE, tau, rule, gate_offset, work, late, shared)
    else:
        mask_TE, weights_TE = select_weights(parts_PTE, tau, rule, gate_offset, work.used_E, late, shared)
    # Of one token nothing is lost by storing sums as they are.
    h_TF = torch.empty(T, up_FD.shape[0], dtype=torch.float32 if T == 1 else x_TD.dtype, device=x_TD.device)
    up(x_TD, mask_TE, None if gate_offset is None else weights_TE, *up_args, work, h_TF)
    return down(h_TF, work, down_FD, down_bias_D, expert_size, x_TD.dtype, early=T == 1)


def expert_up(
    x_TD: Tensor,
    mask_TE: Tensor,
    up_FD: Tensor,
    up_bias_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_bias_F: Tensor | None,
    activation: str,
    expert_size: int,
) -> Tensor:
    """See :func:`torch_prunepath.ops.expert_up`."""
    up_args = (up_FD, up_bias_F, gate_FD, gate_bias_F, activation, expert_size)
    mask_TE = mask_TE.contiguous()
    if 0 < x_TD.shape[0] <= UNION_TOKENS:
        work = workspace(mask_TE.shape[1], 0, x_TD.device)
        list_experts(mask_TE, work)
        h_TF = x_TD.new_zeros(x_TD.shape[0], up_FD.shape[0])
        up(x_TD, mask_TE, None, *up_args, work, h_TF)
        return h_TF
    pre_TF, gate_TF = _pre(x_TD, up_FD, up_bias_F, gate_FD, gate_bias_F)
    return activate_masked_(pre_TF, gate_TF, mask_TE, None, activation, expert_size)


def expert_down(
    h_TF: Tensor,
    mask_TE: Tensor,
    gates_TE: Tensor | None,
    down_FD: Tensor,
    down_bias_D: Tensor | None,
    expert_size: int,
) -> Tensor:
    """See :func:`torch_prunepath.ops.expert_down`."""
    mask_TE = mask_TE.contiguous()
    weights_TE = None if gates_TE is None else gates_TE.float().contiguous()
    h_TF = activate_masked_(h_TF.clone(), None, mask_TE, weights_TE, "none", expert_size)
    if not 0 < h_TF.shape[0] <= UNION_TOKENS:
        return nnf.linear(h_TF, down_FD.t(), down_bias_D)
    work = workspace(mask_TE.shape[1], column_blocks(h_TF.shape[0], down_FD.shape[1]), h_TF.device)
    list_experts(mask_TE, work)
    return down(h_TF, work, down_FD, down_bias_D, expert_size, h_TF.dtype, early=False)


def _pre(
    x_TD: Tensor, up_FD: Tensor, up_bias_F: Tensor | None, gate_FD: Tensor | None, gate_bias_F: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What up and gate give for every neuron."""
    return nnf.linear(x_TD, up_FD, up_bias_F), None if gate_FD is None else nnf.linear(x_TD, gate_FD, gate_bias_F)
