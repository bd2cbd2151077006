"""Dense linear layers of one token, several at once where they read the same token: what surrounds a sparse FFN.

Shapes: D input features, N output features of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_prunepath.csrc_triton import LINEARS_AT_ONCE
from torch_prunepath.csrc_triton.jit import launch_options, overlaps


@triton.jit
def _product(
    x_ptr, weight_ptr, bias_ptr, y_ptr, block, N, stride_x, stride_d, stride_n,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute ``BLOCK_N`` outputs of one layer. The first weights are on their way before the token is there."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    at = weight_ptr + n.to(tl.int64)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    inside = (n < N)[:, None]
    w = tl.load(at, mask=inside & (d < D)[None, :], other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + d * stride_x, mask=d < D, other=0.0).to(tl.float32)
    acc = w.to(tl.float32) * x[None, :]
    for start in tl.static_range(BLOCK_D, D, BLOCK_D):
        at += BLOCK_D * stride_d
        w = tl.load(at, mask=inside & (start + d < D)[None, :], other=0.0)
        x = tl.load(x_ptr + (start + d) * stride_x, mask=start + d < D, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _linears_one(
    x_ptr,
    weight0_ptr, bias0_ptr, y0_ptr, N0, stride_d0, stride_n0,
    weight1_ptr, bias1_ptr, y1_ptr, N1, stride_d1, stride_n1,
    weight2_ptr, bias2_ptr, y2_ptr, N2, stride_d2, stride_n2,
    stride_x,
    D: tl.constexpr,
    LAYERS: tl.constexpr,
    BIAS0: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first, second = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    if block < first:
        _product(
            x_ptr, weight0_ptr, bias0_ptr, y0_ptr, block, N0, stride_x, stride_d0, stride_n0,
            D, BLOCK_N, BLOCK_D, BIAS0, OVERLAP,
        )  # fmt: skip
    elif LAYERS > 1:
        if block < first + second:
            _product(
                x_ptr, weight1_ptr, bias1_ptr, y1_ptr, block - first, N1, stride_x, stride_d1, stride_n1,
                D, BLOCK_N, BLOCK_D, BIAS1, OVERLAP,
            )  # fmt: skip
        elif LAYERS > 2:
            _product(
                x_ptr, weight2_ptr, bias2_ptr, y2_ptr, block - first - second, N2, stride_x, stride_d2, stride_n2,
                D, BLOCK_N, BLOCK_D, BIAS2, OVERLAP,
            )  # fmt: skip


def _config(inputs: int) -> dict[str, int]:
    """How the kernel divides its work: the fastest of those tried on an H100, each output's weights contiguous.

    What it gains is in docs/log.md, "whole models decoding on an H100" (``fuse_linears``); what it was chosen among was
    not kept.
    """
    block_d, warps = (1024, 2) if inputs <= 1024 else (2048, 4)
    return {"BLOCK_N": 2, "BLOCK_D": min(block_d, max(16, triton.next_power_of_2(inputs))), "num_warps": warps}


def linears(x_1D: Tensor, weights_DN: Sequence[Tensor], biases_N: Sequence[Tensor | None]) -> list[Tensor]:
    """Dense linear layers of one token, as :func:`torch_prunepath.ops.linears.linears`."""
    if x_1D.shape[0] != 1 or len(weights_DN) > LINEARS_AT_ONCE:
        given = f"{len(x_1D)} and {len(weights_DN)} given"
        raise ValueError(f"linears takes one token and at most {LINEARS_AT_ONCE} layers: {given}")
    count, D = len(weights_DN), x_1D.shape[1]
    sizes = [weight.shape[1] for weight in weights_DN]
    results = [torch.empty(1, N, dtype=x_1D.dtype, device=x_1D.device) for N in sizes]
    config = _config(D)
    layers: list[object] = []
    for i in range(LINEARS_AT_ONCE):
        j = min(i, count - 1)  # for a layer that is not there, something of the same kind
        N = sizes[j] if i < count else 0
        layers += [weights_DN[j], biases_N[j], results[j], N, *weights_DN[j].stride()]
    blocks = sum(triton.cdiv(N, config["BLOCK_N"]) for N in sizes)
    _linears_one[(blocks,)](
        x_1D,
        *layers,
        x_1D.stride(1),
        D=D,
        LAYERS=count,
        **{f"BIAS{i}": i < count and biases_N[i] is not None for i in range(LINEARS_AT_ONCE)},
        OVERLAP=overlaps(x_1D),
        **config,
        **launch_options(x_1D),
    )
    return results
