"""Router scores of few tokens: a matrix-vector product in float32.

Shapes: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import begin, interpreted, launch_options, overlaps
from torch_prunepath.csrc_triton.order import Workspace, clear


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
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    pid = tl.program_id(0)
    clear(used_ptr, count_ptr, arrivals_ptr, pid * ROWS, tl.minimum((pid + 1) * ROWS, E), column_blocks)
    e = pid * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    row_ptr = weight_ptr + e.to(tl.int64)[:, None] * stride_e
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        x = tl.load(x_ptr + (start + d).to(tl.int64) * stride_x, mask=start + d < D, other=0.0).to(tl.float32)
        inside = (e < E)[:, None] & (start + d < D)[None, :]
        w = tl.load(row_ptr + (start + d)[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        acc += w * x[None, :]
    scores = tl.sum(acc, axis=1)
    if BIAS:
        scores += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(scores_ptr + e, scores, mask=e < E)


def _config(hidden: int) -> dict[str, int]:
    """Measured on an H100; see docs/log.md."""
    if hidden <= 1024:
        return {"ROWS": 1, "BLOCK_D": triton.next_power_of_2(hidden), "num_warps": 1}
    return {"ROWS": 2, "BLOCK_D": 1024, "num_warps": 4}


def router_one(x_1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None, work: Workspace) -> Tensor:
    """Scores of one token, float32 ``[1, 1, E]``; clears ``work`` on the way."""
    E, D = weight_ED.shape
    parts_PTE = torch.empty(1, 1, E, dtype=torch.float32, device=x_1D.device)
    config = _config(D)
    _router_one[(triton.cdiv(E, config["ROWS"]),)](
        x_1D,
        weight_ED,
        bias_E,
        parts_PTE,
        *work[1:],
        E,
        work.arrivals.numel(),
        x_1D.stride(1),
        *weight_ED.stride(),
        D=D,
        BIAS=bias_E is not None,
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
    OVERLAP: tl.constexpr,
):
    """Scores of several tokens over one part of D: ``partial[split, t, e]``; the bias is in split 0."""
    begin(OVERLAP)
    pid, split = tl.program_id(0), tl.program_id(1)
    if split == 0:
        clear(used_ptr, count_ptr, arrivals_ptr, pid * ROWS, tl.minimum((pid + 1) * ROWS, E), column_blocks)
    e = pid * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_T, ROWS), tl.float32)
    for step in range(SHARE):
        d = (split * SHARE + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        x_at = x_ptr + t.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_x
        x = tl.load(x_at, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        w_at = weight_ptr + e.to(tl.int64)[None, :] * stride_e + d[:, None] * stride_d
        w = tl.load(w_at, mask=(e < E)[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if BIAS and split == 0:
        acc += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    out = partial_ptr + (split * T + t).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out, acc, mask=(t < T)[:, None] & (e < E)[None, :])


def router_split(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, work: Workspace) -> Tensor:
    """Parts of the scores, float32 ``[splits, T, E]``, to be summed; clears ``work`` on the way."""
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    rows, block = 16, 128
    splits = min(4, triton.cdiv(D, block))
    share = triton.cdiv(triton.cdiv(D, block), splits)
    partial = torch.empty(splits, T, E, dtype=torch.float32, device=x_TD.device)
    _router_split[(triton.cdiv(E, rows), splits)](
        x_TD,
        weight_ED,
        bias_E,
        partial,
        *work[1:],
        T,
        E,
        work.arrivals.numel(),
        *x_TD.stride(),
        *weight_ED.stride(),
        D=D,
        SHARE=share,
        BLOCK_T=max(16, triton.next_power_of_2(T)),
        ROWS=rows,
        BLOCK_D=block,
        BIAS=bias_E is not None,
        UPCAST=interpreted() or x_TD.dtype != weight_ED.dtype,
        OVERLAP=overlaps(x_TD),
        num_warps=4,
        num_stages=4,
        **launch_options(x_TD),
    )
    return partial
