"""Activation, mask and experts' weights of many tokens in one pass over what dense products left.

Shapes: T tokens, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import activate

MOST_AT_ONCE = 2048
"""How many neurons of a token a program takes, 16 a thread; a guess."""


@triton.jit
def _masked(
    up_ptr,
    gate_ptr,
    mask_ptr,
    weights_ptr,
    E,
    F,
    stride_up,
    stride_gate,
    S: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
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
) -> Tensor:
    """Hidden activations times the experts' weights, 0 where inactive, in place.

    Hidden activations are ``act(gate) * up``, or ``act(up)`` in a plain FFN.

    Args:
        up_TF: what up answers, ``[T, F]``, each row contiguous; overwritten and returned.
        gate_TF: what gate answers, likewise, or None.
        mask_TE: bool ``[T, E]``, contiguous.
        weights_TE: float32 ``[T, E]``, contiguous, or None for 1.
        activation: key of ``ACTIVATIONS``, or ``"none"``.
        expert_size: S.
    """
    T, F = up_TF.shape
    block = min(MOST_AT_ONCE, triton.next_power_of_2(F))
    gate = up_TF if gate_TF is None else gate_TF
    _masked[(T, triton.cdiv(F, block))](
        up_TF,
        gate,
        mask_TE,
        weights_TE,
        mask_TE.shape[1],
        F,
        up_TF.stride(0),
        gate.stride(0),
        S=expert_size,
        ACTIVATION=activation,
        GATED=gate_TF is not None,
        WEIGHTS=weights_TE is not None,
        BLOCK_F=block,
        num_warps=4,
    )
    return up_TF
