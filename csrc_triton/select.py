"""Selection of many tokens: scores -> active experts, one program a token.

A search finds the lowest score of which something is active; ties are then counted off by index.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import begin, launch_options, overlaps
from torch_prunepath.csrc_triton.router import LateNorm, finish
from torch_prunepath.rms import EPSILON

LOWEST = tl.constexpr(128.0)
"""How far below the largest score an expert has no probability left: exp(-128) is 0 in float32."""


@triton.jit
def _select(
    scores_ptr,
    tau_ptr,
    mask_ptr,
    weights_ptr,
    used_ptr,
    squares_ptr,
    bias_ptr,
    E,
    D,
    gate_offset,
    stride_split,
    stride_t,
    SPLITS: tl.constexpr,
    BELOW: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    USED: tl.constexpr,
    SHARED: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    EPSILON: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_E)
    z = tl.load(scores_ptr + t * stride_t + j, mask=j < E, other=-float("inf"))
    for split in tl.static_range(1, SPLITS):
        z += tl.load(scores_ptr + split * stride_split + t * stride_t + j, mask=j < E, other=0.0)
    if NORM:
        z = finish(z, squares_ptr, bias_ptr, t, j, E, D, SPLITS, BIAS, EPSILON)
    if SHARED > 0:
        z = tl.where(j < SHARED, -float("inf"), z)
    tau = tl.load(tau_ptr)
    hi = tl.max(z, axis=0)
    p = tl.exp(z - hi)
    total = tl.sum(p, axis=0)
    # The lowest score of which something is active lies in (lo, hi]: what is lower than that has no probability left.
    lo = hi - LOWEST
    parts = (tl.arange(0, WAYS) + 1).to(tl.float32) / (WAYS + 1)
    more = hi > lo
    while more:
        probes = lo + (hi - lo) * parts
        masses = tl.sum(tl.where(z[None, :] > probes[:, None], p[None, :], 0.0), axis=1)
        enough = masses < tau * total
        upper = tl.minimum(hi, tl.min(tl.where(enough, probes, hi), axis=0))
        lower = tl.maximum(lo, tl.max(tl.where(enough, lo, probes), axis=0))
        left = tl.sum(((z > lower) & (z <= upper)).to(tl.int32), axis=0)
        # Equal scores cannot be told apart: then until no float lies between.
        more = (left > 1) & ((upper < hi) | (lower > lo))
        hi, lo = upper, lower
    lowest = tl.max(tl.where(z <= hi, z, -float("inf")), axis=0)
    ahead = tl.sum(tl.where(z > lowest, p, 0.0), axis=0)
    tied = z == lowest
    before = tl.cumsum(tied.to(tl.int32), axis=0) - tied.to(tl.int32)
    if BELOW:
        # The first of the highest ones is active however much mass it has.
        first = before + tl.sum((z > lowest).to(tl.int32), axis=0) == 0
        fits = (ahead + (before + 1).to(tl.float32) * p < tau * total) | first
    else:
        fits = ahead + before.to(tl.float32) * p < tau * total
    # As numbers: the interpreter cannot join a block of bools and a single one.
    everything = ((tau >= 1.0) | (total != total)).to(tl.int32)
    active = ((z > lowest) | (tied & fits)).to(tl.int32) + everything > 0
    if SHARED > 0:
        active = active | (j < SHARED)
    tl.store(mask_ptr + t * E + j, active, mask=j < E)
    if WEIGHTS:
        weight = tl.sigmoid(z + gate_offset) if SIGMOID else tl.full((BLOCK_E,), 1.0, tl.float32)
        if SHARED > 0:
            weight = tl.where(j < SHARED, 1.0, weight)
        tl.store(weights_ptr + t * E + j, tl.where(active, weight, 0.0), mask=j < E)
    if USED:
        tl.store(used_ptr + j, tl.full((BLOCK_E,), 1, tl.int32), mask=active & (j < E))  # never 0: tokens share these


def _config(tokens: int, block: int) -> dict[str, int]:
    """How the kernel divides its work: one warp needs no barriers, and more probes pay while tokens leave places free.

    The search in one warp took the place of one with 25 barriers (docs/log.md, "kernels for one FFN on an H100",
    "selection by bisection"); 64 tokens and 1024 experts are guesses.
    """
    return {"WAYS": 4 if tokens <= 64 else 2, "num_warps": 1 if block <= 1024 else 4}


def _launch(
    scores_PTE: Tensor,
    tau: Tensor,
    rule: str,
    weights_TE: Tensor | None,
    gate_offset: float | None,
    used_E: Tensor | None,
    late: LateNorm | None,
    shared: int,
) -> Tensor:
    splits, T, E = scores_PTE.shape
    mask_TE = torch.empty(T, E, dtype=torch.bool, device=scores_PTE.device)
    block = triton.next_power_of_2(E)
    if T > 0:
        _select[(T,)](
            scores_PTE,
            tau,
            mask_TE.view(torch.uint8),
            weights_TE,
            used_E,
            *(late or (None, None))[:2],
            E,
            0 if late is None else late.hidden,
            0.0 if gate_offset is None else gate_offset,
            scores_PTE.stride(0),
            scores_PTE.stride(1),
            SPLITS=splits,
            BELOW=rule == "below",
            WEIGHTS=weights_TE is not None,
            SIGMOID=gate_offset is not None,
            USED=used_E is not None,
            SHARED=shared,
            BLOCK_E=block,
            NORM=late is not None,
            BIAS=late is not None and late.router_bias_E is not None,
            EPSILON=EPSILON,
            OVERLAP=overlaps(mask_TE),
            **_config(T, block),
            **launch_options(mask_TE),
        )
    return mask_TE


def select_experts(scores_TE: Tensor, tau: Tensor, rule: str, shared: int = 0) -> Tensor:
    """Active experts, bool ``[T, E]``, as :func:`torch_prunepath.select.select_experts`."""
    return _launch(scores_TE.float().contiguous().unsqueeze(0), tau, rule, None, None, None, None, shared)


def select_weights(
    scores_PTE: Tensor,
    tau: Tensor,
    rule: str,
    gate_offset: float | None,
    used_E: Tensor | None = None,
    late: LateNorm | None = None,
    shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """Active experts, bool ``[T, E]``, and the weights of their outputs, float32 ``[T, E]``, 0 where inactive.

    Args:
        scores_PTE: float32 parts of the scores, summed over P.
        tau: 0-d float32.
        rule: ``"reach"`` or ``"below"``.
        gate_offset: weights are ``sigmoid(score + gate_offset)``; None: 1.
        used_E: int32 ``[E]``, set to 1 for experts that some token activates, or None.
        late: what is to be done to the sums, or None.
        shared: the first so many experts are active with weight 1.
    """
    _, T, E = scores_PTE.shape
    weights_TE = torch.empty(T, E, dtype=torch.float32, device=scores_PTE.device)
    return _launch(scores_PTE, tau, rule, weights_TE, gate_offset, used_E, late, shared), weights_TE
