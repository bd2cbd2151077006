"""Losses on router scores, logits and FFN outputs of one layer or one batch. All are pure and weigh tokens.

``weight_T`` is 0 for tokens that do not count (padding), or None if all count alike. The mean over layers is left to
the caller.

Shapes: T tokens, E experts, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 19
"""Number of logits that are widened to float32 at a time where there is no kernel: few enough for a CPU's caches. It
was close to the fastest size tried (docs/log.md, "everything distilled, few labels, and what a teacher costs")."""


def weighted_mean(values_T: Tensor, weight_T: Tensor | None) -> Tensor:
    """Weighted mean over the tokens, which are the first dimension; 0 if no token counts."""
    if weight_T is None:
        return values_T.mean(0)
    weight_T = weight_T.to(values_T.dtype)
    total = weight_T.sum().clamp_min(torch.finfo(values_T.dtype).tiny)
    return torch.tensordot(weight_T, values_T, dims=1) / total


def entropy(scores_TE: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Mean entropy of ``softmax(scores)``, in nats, which PrunePath (arXiv 2605.28283) adds to the task loss."""
    log_p_TE = scores_TE.log_softmax(-1)
    return weighted_mean(-(log_p_TE.exp() * log_p_TE).sum(-1), weight_T)


def load_balance(scores_TE: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """``E * sum_e mean_t(p_e)^2``, as in PrunePath's released code: 1 if experts are used alike, E if one takes all."""
    mean_E = weighted_mean(scores_TE.softmax(-1), weight_T)
    return scores_TE.shape[-1] * mean_E.square().sum()


def lte_separation(
    scores_TE: Tensor, weight_T: Tensor | None = None, *, eta: float = 1.0, floor: float = 1e-6
) -> Tensor:
    """``eta * mean G^2 + 0.5 * mean (G - 0.5)^-2`` with ``G = sigmoid(scores)``, as in LTE (arXiv 2402.06126).

    Args:
        scores_TE: router scores.
        weight_T: token weights.
        eta: weight of the first term, which makes fewer experts active.
        floor: added to ``(G - 0.5)^2``, which is 0 where a score is 0. It is not in the paper; 1e-6 is a guess.
    """
    g_TE = scores_TE.sigmoid()
    separation_TE = 1 / ((g_TE - 0.5).square() + floor)
    return weighted_mean((eta * g_TE.square() + 0.5 * separation_TE).mean(-1), weight_T)


def contribution_fit(scores_TE: Tensor, shares_TE: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Cross-entropy of ``softmax(scores)`` against soft labels, each expert's share of the contribution norm.

    :func:`torch_prunepath.train.targets.expert_shares` computes the labels.
    """
    return weighted_mean(-(shares_TE * scores_TE.log_softmax(-1)).sum(-1), weight_T)


def distill_ffn(y_TD: Tensor, target_TD: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Squared error of FFN outputs relative to the target's: ``sum |y - target|^2 / sum |target|^2``, in float32.

    No gradient reaches ``target_TD``.
    """
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    target_TD = target_TD.detach().to(wide)
    error = weighted_mean((y_TD.to(wide) - target_TD).square().sum(-1), weight_T)
    return error / weighted_mean(target_TD.square().sum(-1), weight_T).clamp_min(torch.finfo(wide).tiny)


def distill_logits(
    student_TV: Tensor,
    teacher_TV: Tensor,
    weight_T: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """``temperature^2 * mean KL(teacher || student)`` of the softmax of logits over ``temperature``, in nats.

    The factor makes the gradient's size independent of the temperature. The loss is computed in float32 (float64 from
    float64): by one Triton kernel on CUDA devices, elsewhere for some tokens at a time. So besides both logits only the
    student's gradient, in the student's dtype, has size ``[T, V]``. The loss can be differentiated once; no gradient
    reaches the teacher.

    Args:
        student_TV: logits, any floating dtype.
        teacher_TV: logits of the same shape.
        weight_T: token weights.
        temperature: the temperature, positive.
        chunk: tokens at a time where there is no kernel; None: as many as have ``CHUNK_LOGITS`` logits.

    Raises:
        ValueError: if shapes or devices differ.
        ImportError: on a CUDA device without Triton.
    """
    if student_TV.device != teacher_TV.device:
        raise ValueError(
            f"the student's logits are on {student_TV.device}, the teacher's on {teacher_TV.device}: move the teacher"
        )
    if student_TV.shape != teacher_TV.shape:
        raise ValueError(
            f"student and teacher differ in the shape of their logits, {tuple(student_TV.shape)} and "
            f"{tuple(teacher_TV.shape)}: use a teacher with the same vocabulary"
        )
    if weight_T is None:
        weight_T = torch.ones(student_TV.shape[:1], device=student_TV.device)
    loss: Tensor = _Distillation.apply(student_TV, teacher_TV, weight_T, temperature, chunk)
    return loss


class _Distillation(torch.autograd.Function):
    """Computes loss and gradient in one pass over the chunks, so that no float32 logits are kept for backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_TV: Tensor, teacher_TV: Tensor, weight_T: Tensor, temperature: float, chunk: int | None
    ) -> Tensor:
        wide = torch.promote_types(student_TV.dtype, torch.float32)
        weight_T = weight_T.to(wide)
        share_T = weight_T / weight_T.sum().clamp_min(torch.finfo(wide).tiny)
        given = student_TV, teacher_TV, share_T, temperature
        if student_TV.is_cuda and wide == torch.float32:
            loss, ctx.grad_TV = _in_one_kernel(*given, student_TV.requires_grad)
        else:
            loss, ctx.grad_TV = by_chunks(*given, student_TV.requires_grad, chunk)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        return (ctx.grad_TV * grad.to(ctx.grad_TV.dtype), None, None, None, None)


def by_chunks(
    student_TV: Tensor,
    teacher_TV: Tensor,
    share_T: Tensor,
    temperature: float,
    gradient: bool,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same as ``csrc_triton.divergence``, with torch's operators and in the dtype of ``share_T``.

    Returns:
        The loss, 0-d, and its gradient for ``student_TV`` in the student's dtype, or None without ``gradient``.
    """
    chunk = max(1, CHUNK_LOGITS // max(1, student_TV.shape[-1])) if chunk is None else chunk
    loss = torch.zeros((), dtype=share_T.dtype, device=student_TV.device)
    grad_TV = torch.empty_like(student_TV) if gradient else None
    for start in range(0, student_TV.shape[0], chunk):
        part = slice(start, start + chunk)
        log_p_CV = (student_TV[part].to(share_T.dtype) / temperature).log_softmax(-1)
        log_q_CV = (teacher_TV[part].to(share_T.dtype) / temperature).log_softmax(-1)
        q_CV, share_C1 = log_q_CV.exp(), share_T[part, None]
        loss += temperature**2 * (share_C1 * q_CV * (log_q_CV - log_p_CV)).sum()
        if grad_TV is not None:
            grad_TV[part] = temperature * share_C1 * (log_p_CV.exp() - q_CV)
    return loss, grad_TV


def _in_one_kernel(*given: Any) -> tuple[Tensor, Tensor | None]:
    try:
        from torch_prunepath.csrc_triton.divergence import divergence
    except ImportError as error:
        raise ImportError("distillation on a CUDA device needs Triton: pip install triton") from error
    with torch.cuda.device(given[0].device):  # kernels start on the current device
        return divergence(*given)
