"""Router scores of few tokens: a matrix-vector product in float32.

Shapes: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import begin, interpreted, inverse_rms, launch_options, overlaps
from torch_prunepath.csrc_triton.order import Workspace, clear
from torch_prunepath.rms import EPSILON

SPLIT_BLOCK = 128
"""How many columns a program of several tokens' router reads at a time; what it was chosen among was not kept."""

MOST_SPLITS = 4
"""Among how many programs the columns of several tokens' router are divided: the selection adds as many parts for every
score. What it was chosen among was not kept."""


@triton.jit
def _router_one(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scores_ptr,
    used_ptr,
    count_ptr,
    arrivals_ptr,
    E,
    column_blocks,
    stride_x,
    stride_e,
    stride_d,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    pid = tl.program_id(0)
    clear(used_ptr, count_ptr, arrivals_ptr, pid * ROWS, tl.minimum((pid + 1) * ROWS, E), column_blocks)
    e = pid * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    row_ptr = weight_ptr + e.to(tl.int64)[:, None] * stride_e
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        x = tl.load(x_ptr + (start + d).to(tl.int64) * stride_x, mask=start + d < D, other=0.0).to(tl.float32)
        inside = (e < E)[:, None] & (start + d < D)[None, :]
        w = tl.load(row_ptr + (start + d)[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        acc += w * x[None, :]
        if NORM:
            squares += x * x
    scores = tl.sum(acc, axis=1)
    if NORM:
        scores *= inverse_rms(tl.sum(squares, axis=0), D, EPSILON)
    if BIAS:
        scores += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(scores_ptr + e, scores, mask=e < E)


def _config(hidden: int) -> dict[str, int]:
    """How one token's kernel divides its work: a row or two a program, so that all multiprocessors have some.

    The fastest of those tried on an H100 while the kernels of docs/log.md, "kernels for one FFN on an H100", grew; what
    it was chosen among was not kept.
    """
    if hidden <= 1024:
        return {"ROWS": 1, "BLOCK_D": triton.next_power_of_2(hidden), "num_warps": 1}
    return {"ROWS": 2, "BLOCK_D": 1024, "num_warps": 4}


def router_one(
    x_1D: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, work: Workspace, router_norm: bool = False
) -> Tensor:
    """Scores of one token, float32 ``[1, 1, E]``; clears ``work`` on the way."""
    E, D = router_ED.shape
    parts_PTE = torch.empty(1, 1, E, dtype=torch.float32, device=x_1D.device)
    config = _config(D)
    _router_one[(triton.cdiv(E, config["ROWS"]),)](
        x_1D,
        router_ED,
        router_bias_E,
        parts_PTE,
        *work[1:],
        E,
        work.arrivals.numel(),
        x_1D.stride(1),
        *router_ED.stride(),
        D=D,
        BIAS=router_bias_E is not None,
        NORM=router_norm,
        EPSILON=EPSILON,
        OVERLAP=overlaps(x_1D),
        **config,
        **launch_options(x_1D),
    )
    return parts_PTE


@triton.jit
def _router_split(
    x_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    squares_ptr,
    used_ptr,
    count_ptr,
    arrivals_ptr,
    T,
    E,
    column_blocks,
    stride_t,
    stride_x,
    stride_e,
    stride_d,
    D: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Scores of several tokens over one part of D: ``partial[split, t, e]``; the bias is in split 0.

    With NORM there is no bias, and the sum of x^2 over this part goes to ``squares[t, split]``.
    """
    begin(OVERLAP)
    pid, split = tl.program_id(0), tl.program_id(1)
    if split == 0:
        clear(used_ptr, count_ptr, arrivals_ptr, pid * ROWS, tl.minimum((pid + 1) * ROWS, E), column_blocks)
    e = pid * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_T, ROWS), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for step in range(SHARE):
        d = (split * SHARE + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        x_at = x_ptr + t.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_x
        x = tl.load(x_at, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        w_at = weight_ptr + e.to(tl.int64)[None, :] * stride_e + d[:, None] * stride_d
        w = tl.load(w_at, mask=(e < E)[None, :] & (d < D)[:, None], other=0.0)
        if NORM:
            squares += x.to(tl.float32) * x.to(tl.float32)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if BIAS and split == 0:
        acc += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if NORM and pid == 0:
        tl.store(squares_ptr + t * tl.num_programs(1) + split, tl.sum(squares, axis=1), mask=t < T)
    out = partial_ptr + (split * T + t).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out, acc, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit
def finish(score, squares_ptr, bias_ptr, t, e, E, D, PARTS: tl.constexpr, BIAS: tl.constexpr, EPSILON: tl.constexpr):
    """Scores of experts ``e`` of token ``t`` after what :class:`LateNorm` says; -inf where there is no such expert."""
    squares = tl.load(squares_ptr + t * PARTS)
    for part in tl.static_range(1, PARTS):
        squares += tl.load(squares_ptr + t * PARTS + part)
    score *= inverse_rms(squares, D, EPSILON)
    if BIAS:
        score += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    return tl.where(e < E, score, -float("inf"))


class LateNorm(NamedTuple):
    """What is still to be done to a sum of parts, because no part knows the whole token: ``sum / rms(x) + bias``.

    Attributes:
        squares_TP: float32, each part's sum of ``x^2``.
        router_bias_E: ``[E]``, or None.
        hidden: D.
    """

    squares_TP: Tensor
    router_bias_E: Tensor | None
    hidden: int


def late_norm(x_TD: Tensor, router_bias_E: Tensor | None) -> LateNorm:
    """Uninitialised; :func:`router_split` fills it, and the selection applies it."""
    T, D = x_TD.shape
    return LateNorm(torch.empty(T, _splits(D), dtype=torch.float32, device=x_TD.device), router_bias_E, D)


def _splits(hidden: int) -> int:
    return min(MOST_SPLITS, triton.cdiv(hidden, SPLIT_BLOCK))  # type: ignore[no-any-return]


def router_split(
    x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, work: Workspace, late: LateNorm | None = None
) -> Tensor:
    """Parts of the scores, float32 ``[splits, T, E]``, to be summed; clears ``work`` on the way.

    With ``late``, to be summed and normalised, and to get their bias then.
    """
    (T, D), E = x_TD.shape, router_ED.shape[0]
    rows, splits = 16, _splits(D)
    share = triton.cdiv(triton.cdiv(D, SPLIT_BLOCK), splits)
    partial = torch.empty(splits, T, E, dtype=torch.float32, device=x_TD.device)
    _router_split[(triton.cdiv(E, rows), splits)](
        x_TD,
        router_ED,
        router_bias_E,
        partial,
        None if late is None else late.squares_TP,
        *work[1:],
        T,
        E,
        work.arrivals.numel(),
        *x_TD.stride(),
        *router_ED.stride(),
        D=D,
        SHARE=share,
        BLOCK_T=max(16, triton.next_power_of_2(T)),
        ROWS=rows,
        BLOCK_D=SPLIT_BLOCK,
        BIAS=router_bias_E is not None and late is None,
        UPCAST=interpreted() or x_TD.dtype != router_ED.dtype,
        NORM=late is not None,
        OVERLAP=overlaps(x_TD),
        num_warps=4,
        num_stages=4,
        **launch_options(x_TD),
    )
    return partial
