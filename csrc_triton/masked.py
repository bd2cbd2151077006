"""Activation, mask and experts' weights of many tokens in one pass over what dense products left.

Shapes: T tokens, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import activate
from torch_prunepath.weights import Threshold

MOST_AT_ONCE = 2048
"""How many neurons of a token a program takes, 16 a thread; a guess."""


@triton.jit
def _masked(
    up_ptr,
    gate_ptr,
    mask_ptr,
    weights_ptr,
    theta_h_ptr,
    row_norm_ptr,
    E,
    F,
    stride_up,
    stride_gate,
    S: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    ok = f < F
    at = t * E + f // S
    h = tl.load(up_ptr + t * stride_up + f, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        h *= activate(tl.load(gate_ptr + t * stride_gate + f, mask=ok, other=0.0).to(tl.float32), ACTIVATION)
    else:
        h = activate(h, ACTIVATION)
    if NEURONS:
        h = tl.where(tl.abs(h) * tl.load(row_norm_ptr + f, mask=ok, other=0.0) < tl.load(theta_h_ptr), 0.0, h)
    if WEIGHTS:
        h *= tl.load(weights_ptr + at, mask=ok, other=0.0)
    h = tl.where(tl.load(mask_ptr + at, mask=ok, other=0) != 0, h, 0.0)
    tl.store(up_ptr + t * stride_up + f, h.to(up_ptr.dtype.element_ty), mask=ok)


def activate_masked_(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    activation: str,
    expert_size: int,
    neurons: Threshold | None = None,
) -> Tensor:
    """Hidden activations times the experts' weights, 0 where inactive or under a threshold, in place.

    Hidden activations are ``act(gate) * up``, or ``act(up)`` in a plain FFN.

    Args:
        up_TF: what up answers, ``[T, F]``, each row contiguous; overwritten and returned.
        gate_TF: what gate answers, likewise, or None.
        mask_TE: bool ``[T, E]``, contiguous.
        weights_TE: float32 ``[T, E]``, contiguous, or None for 1.
        activation: key of ``ACTIVATIONS``, or ``"none"``.
        expert_size: S.
        neurons: which hidden activations count, before their experts' weights; None: all.
    """
    T, F = up_TF.shape
    block = min(MOST_AT_ONCE, triton.next_power_of_2(F))
    gate = up_TF if gate_TF is None else gate_TF
    _masked[(T, triton.cdiv(F, block))](
        up_TF,
        gate,
        mask_TE,
        weights_TE,
        *(neurons or (None, None)),
        mask_TE.shape[1],
        F,
        up_TF.stride(0),
        gate.stride(0),
        S=expert_size,
        ACTIVATION=activation,
        GATED=gate_TF is not None,
        WEIGHTS=weights_TE is not None,
        NEURONS=neurons is not None,
        BLOCK_F=block,
        num_warps=4,
    )
    return up_TF
