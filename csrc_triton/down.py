"""The down projection over active experts only, with a reduction whose order does not depend on timing.

Each program sums some rows of some columns. Programs leave float32 sums behind; the last to arrive adds them up, always
in the same order. Shapes: T tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import begin, interpreted, launch_options, overlaps
from torch_prunepath.csrc_triton.order import Workspace


def _config(tokens: int, hidden: int) -> dict[str, int]:
    """How the kernel divides its work, the fastest of those tried on an H100.

    docs/log.md has what was tried for several tokens, "whole models decoding on an H100" ("block sizes for several
    tokens") and "the FFN and decoding tables made anew on an H100". For one token times were not kept.
    """
    if tokens == 1 and hidden < 2048:
        return {"SPLITS": 32, "ROWS": 64, "BLOCK_D": 64, "num_warps": 1}
    if tokens > 8:
        return {"SPLITS": 8, "ROWS": 128, "BLOCK_D": 64, "num_warps": 4}
    return {"SPLITS": 16, "ROWS": 64, "BLOCK_D": 64, "num_warps": 2}


def column_blocks(tokens: int, hidden: int) -> int:
    """Number of arrival counters that :func:`down` needs."""
    return triton.cdiv(hidden, _config(tokens, hidden)["BLOCK_D"])


@triton.jit
def _rows_of(order_ptr, start, neurons, E, F, S: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr):
    """Which rows of down are numbers ``start`` to ``start + ROWS - 1`` of those in use, and whether they exist."""
    r = start + tl.arange(0, ROWS)
    # Read whether or not the list is that long: its length may still be on its way.
    e = tl.load(order_ptr + r // S, mask=r < E * S, other=0, cache_modifier=CACHE)
    f = e * S + r % S
    return f, (r < neurons) & (f < F)


@triton.jit
def _weights(down_ptr, f, ok, d, stride_f, stride_d, D: tl.constexpr):
    at = down_ptr + f.to(tl.int64)[:, None] * stride_f + d.to(tl.int64)[None, :] * stride_d
    return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _sum_one(
    h_ptr,
    order_ptr,
    count_ptr,
    down_ptr,
    split,
    d,
    E,
    F,
    stride_f,
    stride_d,
    D: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program's share of one token's ``h @ down`` over the experts in use: ``[1, BLOCK_D]``.

    EARLY: the list comes from the predecessor's predecessor, which is over when this program starts. Then the first
    rows of the weight are read while the predecessor, which writes h, still runs.
    """
    if not EARLY:
        begin(OVERLAP)
    neurons = tl.load(count_ptr, cache_modifier=".cg") * S
    start = split * ROWS
    f, ok = _rows_of(order_ptr, start, neurons, E, F, S, ROWS, ".cg")
    w = _weights(down_ptr, f, ok, d, stride_f, stride_d, D)
    if EARLY:
        begin(OVERLAP)
    acc = tl.load(h_ptr + f, mask=ok, other=0.0).to(tl.float32)[:, None] * w.to(tl.float32)
    for later in range(start + SPLITS * ROWS, neurons, SPLITS * ROWS):
        f, ok = _rows_of(order_ptr, later, neurons, E, F, S, ROWS, "")
        w = _weights(down_ptr, f, ok, d, stride_f, stride_d, D)
        acc += tl.load(h_ptr + f, mask=ok, other=0.0).to(tl.float32)[:, None] * w.to(tl.float32)
    return tl.expand_dims(tl.sum(acc, axis=0), 0)


@triton.jit
def _sum_few(
    h_ptr,
    order_ptr,
    count_ptr,
    down_ptr,
    split,
    d,
    T,
    E,
    F,
    stride_h,
    stride_f,
    stride_d,
    D: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """This program's share of several tokens' ``h @ down``, listed by the predecessor: ``[BLOCK_T, BLOCK_D]``."""
    begin(OVERLAP)
    neurons = tl.load(count_ptr) * S
    t = tl.arange(0, BLOCK_T)
    h_at = h_ptr + t.to(tl.int64)[:, None] * stride_h
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(split * ROWS, neurons, SPLITS * ROWS):
        f, ok = _rows_of(order_ptr, start, neurons, E, F, S, ROWS, "")
        w = _weights(down_ptr, f, ok, d, stride_f, stride_d, D)
        h = tl.load(h_at + f[None, :], mask=(t < T)[:, None] & ok[None, :], other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _down(
    h_ptr,
    order_ptr,
    count_ptr,
    arrivals_ptr,
    down_ptr,
    bias_ptr,
    partial_ptr,
    y_ptr,
    T,
    E,
    F,
    stride_h,
    stride_f,
    stride_d,
    D: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    column, split = tl.program_id(0), tl.program_id(1)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    if BLOCK_T == 1:
        acc = _sum_one(
            h_ptr, order_ptr, count_ptr, down_ptr, split, d, E, F, stride_f, stride_d,
            D, S, SPLITS, ROWS, BLOCK_D, EARLY, OVERLAP,
        )  # fmt: skip
    else:
        acc = _sum_few(
            h_ptr, order_ptr, count_ptr, down_ptr, split, d, T, E, F, stride_h, stride_f, stride_d,
            D, S, SPLITS, BLOCK_T, ROWS, BLOCK_D, UPCAST, OVERLAP,
        )  # fmt: skip
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(partial_ptr + split.to(tl.int64) * T * D + at, acc, mask=inside)
    # All of this program's threads must have stored before one of them says so.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + column, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        part_at = partial_ptr + at
        for _ in tl.static_range(SPLITS):
            y += tl.load(part_at, mask=inside, other=0.0, cache_modifier=".cg")
            part_at += T * D
        if BIAS:
            y += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def down(
    h_TF: Tensor,
    work: Workspace,
    down_FD: Tensor,
    down_bias_D: Tensor | None,
    expert_size: int,
    dtype: torch.dtype,
    *,
    early: bool,
) -> Tensor:
    """Output of the down projection over the experts listed in ``work``: ``h @ down``, plus the bias.

    Args:
        h_TF: ``[T, F]``, contiguous; float32 for one token, else the dtype of ``down_FD``. Neurons of experts that are
            not listed are not read.
        work: what is in use; its arrivals are used up.
        down_FD: rows ``[F, D]``, any strides.
        down_bias_D: ``[D]`` or None.
        expert_size: S.
        dtype: of the result.
        early: whether at least one kernel of this package was launched between the one that wrote the list and now.

    Returns:
        ``[T, D]``.
    """
    (F, D), T = down_FD.shape, h_TF.shape[0]
    config = _config(T, D)
    partial = torch.empty(config["SPLITS"], T, D, dtype=torch.float32, device=h_TF.device)
    y_TD = torch.empty(T, D, dtype=dtype, device=h_TF.device)
    _down[(work.arrivals.numel(), config["SPLITS"])](
        h_TF,
        work.order_E,
        work.length,
        work.arrivals,
        down_FD,
        down_bias_D,
        partial,
        y_TD,
        T,
        work.order_E.numel(),
        F,
        h_TF.stride(0),
        *down_FD.stride(),
        D=D,
        S=expert_size,
        BLOCK_T=1 if T == 1 else max(16, triton.next_power_of_2(T)),
        BIAS=down_bias_D is not None,
        UPCAST=interpreted(),
        EARLY=early,
        OVERLAP=overlaps(h_TF),
        **config,
        **launch_options(h_TF),
    )
    return y_TD
