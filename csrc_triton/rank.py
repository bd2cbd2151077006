"""Selection of few tokens: every expert decides for itself, by comparing its score with all others.

That needs no sort: ``mass_before(e)`` is the sum over the experts with a higher score (or the same and a lower index).
Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import begin, launch_options, overlaps
from torch_prunepath.csrc_triton.order import Workspace
from torch_prunepath.csrc_triton.router import LateNorm, finish
from torch_prunepath.rms import EPSILON


@triton.jit
def _rank(
    parts_ptr,
    tau_ptr,
    mask_ptr,
    weights_ptr,
    order_ptr,
    used_ptr,
    count_ptr,
    squares_ptr,
    bias_ptr,
    E,
    D,
    gate_offset,
    stride_part,
    stride_t,
    PARTS: tl.constexpr,
    BELOW: tl.constexpr,
    SIGMOID: tl.constexpr,
    ONE: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    EPSILON: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Whether ROWS experts of one token are active; scores are the sum of PARTS parts."""
    begin(OVERLAP)
    t = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK_E)
    at = parts_ptr + t * stride_t
    z = tl.load(at + j, mask=j < E, other=-float("inf"))
    score = tl.load(at + e, mask=e < E, other=-float("inf"))
    for part in tl.static_range(1, PARTS):
        z += tl.load(at + part * stride_part + j, mask=j < E, other=0.0)
        score += tl.load(at + part * stride_part + e, mask=e < E, other=0.0)
    if NORM:
        z = finish(z, squares_ptr, bias_ptr, t, j, E, D, PARTS, BIAS, EPSILON)
        score = finish(score, squares_ptr, bias_ptr, t, e, E, D, PARTS, BIAS, EPSILON)
    if SHARED > 0:
        z = tl.where(j < SHARED, -float("inf"), z)
    tau = tl.load(tau_ptr)
    p = tl.exp(z - tl.max(z, axis=0))
    total = tl.sum(p, axis=0)
    ahead = (z[None, :] > score[:, None]) | ((z[None, :] == score[:, None]) & (j[None, :] < e[:, None]))
    mass = tl.sum(tl.where(ahead, p[None, :], 0.0), axis=1)
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    if BELOW:
        mass += tl.sum(tl.where(j[None, :] == e[:, None], p[None, :], 0.0), axis=1)
        active = (mass < tau * total) | (rank == 0)
    else:
        active = mass < tau * total
    # As numbers: the interpreter cannot join a block of bools and a single one. A token with a NaN has every expert.
    broken = (total != total).to(tl.int32)
    active = (active.to(tl.int32) + (tau >= 1.0).to(tl.int32) + broken > 0) & (e < E)
    weight = tl.sigmoid(score + gate_offset) if SIGMOID else tl.full((ROWS,), 1.0, tl.float32)
    if SHARED > 0:
        active = active | (e < SHARED)
        weight = tl.where(e < SHARED, 1.0, weight)
        rank = tl.where(e < SHARED, e, rank + SHARED)
    tl.store(mask_ptr + t * E + e, active, mask=e < E)
    tl.store(weights_ptr + t * E + e, tl.where(active, weight, 0.0), mask=e < E)
    if ONE:
        # Sums of one shape are monotone in their terms, rounding included: the active experts have ranks 0 to K-1.
        rank = tl.where(broken != 0, e, rank)
        tl.store(order_ptr + rank, e, mask=active)
        tl.atomic_add(count_ptr, tl.sum(active.to(tl.int32), axis=0), sem="relaxed")
    else:
        tl.store(used_ptr + e, tl.full((ROWS,), 1, tl.int32), mask=active)  # never 0: tokens share these


def _config(tokens: int, experts: int) -> dict[str, int]:
    """How the kernel divides its work: at most about 128 scores a thread, or registers spill.

    For several tokens the fastest of twenty on an H100 (docs/log.md, "whole models decoding on an H100", "selection of
    several tokens"); for one token what it was chosen among was not kept.
    """
    if tokens > 1:
        return {"ROWS": 4, "num_warps": max(1, triton.next_power_of_2(experts) // 1024)}
    if experts <= 512:
        return {"ROWS": 2, "num_warps": 1}
    return {"ROWS": 2 if experts <= 1024 else 4, "num_warps": 4}


def rank(
    parts_PTE: Tensor,
    tau: Tensor,
    rule: str,
    gate_offset: float | None,
    work: Workspace,
    late: LateNorm | None = None,
    shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """Active experts, bool ``[T, E]``, and the weights of their outputs, float32 ``[T, E]``, 0 where inactive.

    Args:
        parts_PTE: float32 parts of the scores, to be summed over P.
        tau: 0-d float32.
        rule: ``"reach"`` or ``"below"``.
        gate_offset: weights are ``sigmoid(score + gate_offset)``; None: 1.
        work: cleared. One token's experts are listed there; of several tokens, which experts are in use.
        late: what is to be done to the sums, or None.
        shared: the first so many experts are active with weight 1.
    """
    parts, T, E = parts_PTE.shape
    mask_TE = torch.empty(T, E, dtype=torch.bool, device=parts_PTE.device)
    weights_TE = torch.empty(T, E, dtype=torch.float32, device=parts_PTE.device)
    config = _config(T, E)
    _rank[(triton.cdiv(E, config["ROWS"]), T)](
        parts_PTE,
        tau,
        mask_TE.view(torch.uint8),
        weights_TE,
        work.order_E,
        work.used_E,
        work.length,
        *(late or (None, None))[:2],
        E,
        0 if late is None else late.hidden,
        0.0 if gate_offset is None else gate_offset,
        parts_PTE.stride(0),
        parts_PTE.stride(1),
        PARTS=parts,
        BELOW=rule == "below",
        SIGMOID=gate_offset is not None,
        ONE=T == 1,
        SHARED=shared,
        BLOCK_E=triton.next_power_of_2(E),
        NORM=late is not None,
        BIAS=late is not None and late.router_bias_E is not None,
        EPSILON=EPSILON,
        OVERLAP=overlaps(mask_TE),
        **config,
        **launch_options(mask_TE),
    )
    return mask_TE, weights_TE
