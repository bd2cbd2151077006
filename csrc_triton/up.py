"""Hidden activations of few tokens, of the experts in use only: gate and up, or fc1, with biases and activation.

A fixed number of programs deal the rows of those experts out among themselves. Shapes: T tokens, D hidden size, F
neurons, E experts of S neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import activate, begin, interpreted, launch_options, multiprocessors, overlaps
from torch_prunepath.csrc_triton.order import Workspace, places, write_order
from torch_prunepath.weights import Thresholds, UpWeights


@triton.jit
def _counted_inputs(x, x32, d, theta_x_ptr, column_norm_ptr, D: tl.constexpr):
    """``x`` with 0 for channels that do not count; ``x32`` is the same in float32, its last dimension that of ``d``."""
    norm = tl.load(column_norm_ptr + d, mask=d < D, other=0.0)
    return tl.where(tl.abs(x32) * norm < tl.load(theta_x_ptr), tl.zeros_like(x), x)


@triton.jit
def _products_one(
    x_ptr,
    up_ptr,
    gate_ptr,
    row,
    row_ok,
    theta_x_ptr,
    column_norm_ptr,
    stride_x,
    stride_up_f,
    stride_up_d,
    stride_gate_f,
    stride_gate_d,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATED: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Products of one token, ``up[row] @ x`` and ``gate[row] @ x``, in float32: each ``[1, ROWS]``."""
    up_at = up_ptr + row.to(tl.int64)[:, None] * stride_up_f
    gate_at = gate_ptr + row.to(tl.int64)[:, None] * stride_gate_f
    h = tl.zeros((ROWS,), tl.float32)
    g = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = row_ok[:, None] & (d < D)[None, :]
        u = tl.load(up_at + d[None, :] * stride_up_d, mask=inside, other=0.0)
        if GATED:  # both on their way before the first is used
            v = tl.load(gate_at + d[None, :] * stride_gate_d, mask=inside, other=0.0)
        x = tl.load(x_ptr + d * stride_x, mask=d < D, other=0.0).to(tl.float32)
        if INPUTS:
            x = _counted_inputs(x, x, d, theta_x_ptr, column_norm_ptr, D)
        x = x[None, :]
        h += tl.sum(u.to(tl.float32) * x, axis=1)
        if GATED:
            g += tl.sum(v.to(tl.float32) * x, axis=1)
    return tl.expand_dims(h, 0), tl.expand_dims(g, 0)


@triton.jit
def _products(
    x_ptr,
    up_ptr,
    gate_ptr,
    row,
    row_ok,
    theta_x_ptr,
    column_norm_ptr,
    T,
    stride_t,
    stride_x,
    stride_up_f,
    stride_up_d,
    stride_gate_f,
    stride_gate_d,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Products of several tokens, ``x @ up[row].T`` and ``x @ gate[row].T``, in float32: each ``[BLOCK_T, ROWS]``."""
    t = tl.arange(0, BLOCK_T)
    x_at = x_ptr + t.to(tl.int64)[:, None] * stride_t
    up_at = up_ptr + row.to(tl.int64)[None, :] * stride_up_f
    gate_at = gate_ptr + row.to(tl.int64)[None, :] * stride_gate_f
    h = tl.zeros((BLOCK_T, ROWS), tl.float32)
    g = tl.zeros((BLOCK_T, ROWS), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        inside = row_ok[None, :] & (d < D)[:, None]
        x = tl.load(x_at + d[None, :] * stride_x, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        u = tl.load(up_at + d[:, None] * stride_up_d, mask=inside, other=0.0)
        if UPCAST:
            x, u = x.to(tl.float32), u.to(tl.float32)
        if INPUTS:
            x = _counted_inputs(x, x.to(tl.float32), d[None, :], theta_x_ptr, column_norm_ptr, D)
        h = tl.dot(x, u, h, input_precision="ieee")
        if GATED:
            v = tl.load(gate_at + d[:, None] * stride_gate_d, mask=inside, other=0.0)
            if UPCAST:
                v = v.to(tl.float32)
            g = tl.dot(x, v, g, input_precision="ieee")
    return h, g


@triton.jit
def _up(
    x_ptr,
    mask_ptr,
    weights_ptr,
    up_ptr,
    up_bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    h_ptr,
    order_ptr,
    used_ptr,
    count_ptr,
    theta_x_ptr,
    column_norm_ptr,
    theta_h_ptr,
    row_norm_ptr,
    T,
    E,
    F,
    stride_t,
    stride_x,
    stride_up_f,
    stride_up_d,
    stride_gate_f,
    stride_gate_d,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LISTED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GATED: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    NEURONS: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    if LISTED:
        count = tl.load(count_ptr)
    else:
        place, count = places(used_ptr, E, BLOCK_E)
        if tl.program_id(0) == 0:
            write_order(place, count, order_ptr, count_ptr, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    for start in range(tl.program_id(0) * ROWS, count * S, tl.num_programs(0) * ROWS):
        # ROWS divides S, or S divides ROWS.
        r = start + tl.arange(0, ROWS)
        if LISTED:
            # Read whether or not the list is that long: its length may still be on its way.
            e = tl.load(order_ptr + r // S, mask=r < E * S, other=0)
        elif ROWS <= S:
            e = tl.sum(tl.where(place == start // S, tl.arange(0, BLOCK_E), 0), axis=0) + tl.zeros((ROWS,), tl.int32)
        else:
            found = place[None, :] == (r // S)[:, None]
            e = tl.sum(tl.where(found, tl.arange(0, BLOCK_E)[None, :], 0), axis=1)
        row = e * S + r % S
        row_ok = (r < count * S) & (row < F)
        if BLOCK_T == 1:
            h, g = _products_one(
                x_ptr, up_ptr, gate_ptr, row, row_ok, theta_x_ptr, column_norm_ptr,
                stride_x, stride_up_f, stride_up_d, stride_gate_f, stride_gate_d,
                D, ROWS, BLOCK_D, GATED, INPUTS,
            )  # fmt: skip
        else:
            h, g = _products(
                x_ptr, up_ptr, gate_ptr, row, row_ok, theta_x_ptr, column_norm_ptr, T,
                stride_t, stride_x, stride_up_f, stride_up_d, stride_gate_f, stride_gate_d,
                D, BLOCK_T, ROWS, BLOCK_D, STAGES, GATED, INPUTS, UPCAST,
            )  # fmt: skip
        if UP_BIAS:
            h += tl.load(up_bias_ptr + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if GATE_BIAS:
                g += tl.load(gate_bias_ptr + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
            h *= activate(g, ACTIVATION)
        else:
            h = activate(h, ACTIVATION)
        inside = (t < T)[:, None] & row_ok[None, :]
        at = t.to(tl.int64)[:, None] * E + e[None, :]
        if NEURONS:
            norm = tl.load(row_norm_ptr + row, mask=row_ok, other=0.0)[None, :]
            h = tl.where(tl.abs(h) * norm < tl.load(theta_h_ptr), 0.0, h)
        if WEIGHTS:
            h *= tl.load(weights_ptr + at, mask=inside, other=0.0)
        if BLOCK_T > 1:  # not zero times what may be infinite
            h = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, h, 0.0)
        tl.store(h_ptr + t.to(tl.int64)[:, None] * F + row[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


def _config(tokens: int, hidden: int, expert_size: int, gated: bool, element_size: int) -> dict[str, int]:
    """How the kernel divides its work, the fastest of those tried on an H100.

    One token: whole rows of gate and up at once, by a fixed number of programs that deal the rows out (docs/log.md,
    "kernels for one FFN on an H100"). Several: 32 rows, two warps, three programs a multiprocessor ("whole models
    decoding on an H100", "block sizes for several tokens"). Other numbers that were tried for one token were not kept.
    """
    if tokens == 1:
        wide = hidden > 2048
        block, rows, stages = 4096, 4 if wide and not gated else 2, 1
        per_sm, warps = (4, 8) if wide else (8, 4)
    else:
        block, rows, stages, per_sm, warps = 256 // element_size, 32 if expert_size >= 32 else 16, 4, 3, 2
    while expert_size % rows and rows % expert_size:
        rows //= 2
    return {
        "ROWS": rows,
        "BLOCK_D": min(block, max(16, triton.next_power_of_2(hidden))),
        "STAGES": stages,
        "programs": per_sm,
        "num_warps": warps,
    }


def up(
    x_TD: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    weights: UpWeights,
    activation: str,
    expert_size: int,
    work: Workspace,
    h_TF: Tensor,
    thresholds: Thresholds,
) -> None:
    """Hidden activations of few tokens; several tokens' experts in use are listed in ``work`` for the down kernel.

    Args:
        x_TD: ``[T, D]``.
        mask_TE: bool ``[T, E]``, contiguous.
        weights_TE: float32 ``[T, E]``, contiguous, to multiply by; None: 1.
        weights: of up and gate.
        activation: key of ``ACTIVATIONS``, or ``"none"``.
        expert_size: S.
        work: which experts are in use (the list, for one token).
        h_TF: result ``[T, F]``, contiguous: written where an expert is in use, 0 for tokens that do not activate it.
        thresholds: which channels are read and which neurons are not 0, before ``weights_TE`` multiplies them.
    """
    up_FD, up_bias_F, gate_FD, gate_bias_F = weights
    (T, D), F, E = x_TD.shape, up_FD.shape[0], mask_TE.shape[1]
    config = _config(T, D, expert_size, gate_FD is not None, x_TD.element_size())
    programs = min(config.pop("programs") * multiprocessors(x_TD), triton.cdiv(E * expert_size, config["ROWS"]))
    gate = up_FD if gate_FD is None else gate_FD
    _up[(programs,)](
        x_TD,
        mask_TE.view(torch.uint8),
        weights_TE,
        up_FD,
        up_bias_F,
        gate,
        gate_bias_F,
        h_TF,
        work.order_E,
        work.used_E,
        work.length,
        *thresholds.parts,
        T,
        E,
        F,
        *x_TD.stride(),
        *up_FD.stride(),
        *gate.stride(),
        D=D,
        S=expert_size,
        BLOCK_T=1 if T == 1 else max(16, triton.next_power_of_2(T)),
        BLOCK_E=triton.next_power_of_2(E),
        ACTIVATION=activation,
        LISTED=T == 1,
        WEIGHTS=weights_TE is not None,
        GATED=gate_FD is not None,
        UP_BIAS=up_bias_F is not None,
        GATE_BIAS=gate_bias_F is not None,
        INPUTS=thresholds.inputs is not None,
        NEURONS=thresholds.neurons is not None,
        UPCAST=interpreted(),
        OVERLAP=overlaps(x_TD),
        **config,
        **launch_options(x_TD),
    )
