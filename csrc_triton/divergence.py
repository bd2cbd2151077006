"""Kullback-Leibler divergence of two models' next-token distributions, and its gradient: each logit is read twice.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_AT_ONCE = 4096
"""How many logits of a token a program holds, 16 a thread for each model; a guess that was within a few percent of
Inductor's kernel (docs/log.md, "targets drawn by halvings, seeds of what is distilled")."""

LEAST = tl.constexpr(-1e30)
"""A number below every logit, and finite: two infinities have no difference."""


@triton.jit
def _add_up(ptr, start, v, V, stride, scale, most, total):
    """Take a block of logits into the largest so far and the sum of exponentials, each place of the block by itself."""
    x = tl.load(ptr + (start + v).to(tl.int64) * stride, mask=start + v < V, other=float("-inf")).to(tl.float32) * scale
    above = tl.maximum(most, x)
    return above, total * tl.exp(most - above) + tl.exp(x - above)


@triton.jit
def _log_sum(most, total):
    """The largest logit, and the logarithm of the sum over it; added up they would lose what logits have in common."""
    largest = tl.max(most, axis=0)
    return largest, tl.log(tl.sum(total * tl.exp(most - largest), axis=0))


@triton.jit
def _divergence(
    student_ptr,
    teacher_ptr,
    share_ptr,
    loss_ptr,
    grad_ptr,
    V,
    scale,
    stride_st,
    stride_sv,
    stride_tt,
    stride_tv,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    student_ptr += t * stride_st
    teacher_ptr += t * stride_tt
    share = tl.load(share_ptr + t)
    v = tl.arange(0, BLOCK)
    most_p, total_p = tl.full((BLOCK,), LEAST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    most_q, total_q = tl.full((BLOCK,), LEAST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        most_p, total_p = _add_up(student_ptr, start, v, V, stride_sv, scale, most_p, total_p)
        most_q, total_q = _add_up(teacher_ptr, start, v, V, stride_tv, scale, most_q, total_q)
    largest_p, log_sum_p = _log_sum(most_p, total_p)
    largest_q, log_sum_q = _log_sum(most_q, total_q)
    divergence = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = (start + v).to(tl.int64)
        inside = at < V
        p = tl.load(student_ptr + at * stride_sv, mask=inside, other=0.0).to(tl.float32) * scale
        q = tl.load(teacher_ptr + at * stride_tv, mask=inside, other=0.0).to(tl.float32) * scale
        p, q = (p - largest_p) - log_sum_p, (q - largest_q) - log_sum_q
        divergence += tl.where(inside, tl.exp(q) * (q - p), 0.0)
        if GRAD:
            tl.store(grad_ptr + t * V + at, share / scale * (tl.exp(p) - tl.exp(q)), mask=inside)
    tl.store(loss_ptr + t, share / scale / scale * tl.sum(divergence, axis=0))


def divergence(
    student_TV: Tensor, teacher_TV: Tensor, share_T: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence ``temperature^2 * sum_t share_t KL(teacher_t || student_t)`` and its gradient, alike from run to run.

    Args:
        student_TV: logits, float32, float16 or bfloat16; computed in float32.
        teacher_TV: logits of the same shape.
        share_T: each token's part of the mean, float32.
        temperature: both logits are divided by it.
        gradient: whether to compute the gradient.

    Returns:
        The sum, 0-d float32, and its gradient towards the student's logits, in their dtype, or None.
    """
    T, V = student_TV.shape
    loss_T = torch.empty(T, dtype=torch.float32, device=student_TV.device)
    grad_TV = torch.empty(T, V, dtype=student_TV.dtype, device=student_TV.device) if gradient else None
    if T:
        _divergence[(T,)](
            student_TV,
            teacher_TV,
            share_T.contiguous(),
            loss_T,
            grad_TV,
            V,
            1.0 / temperature,
            *student_TV.stride(),
            *teacher_TV.stride(),
            BLOCK=min(MOST_AT_ONCE, triton.next_power_of_2(V)),
            GRAD=gradient,
            num_warps=8,
        )
    return loss_T.sum(), grad_TV
