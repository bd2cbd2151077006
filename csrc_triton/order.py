"""What the kernels of one FFN leave for each other: which experts are in use, and who has arrived.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_prunepath.csrc_triton.jit import begin, launch_options, overlaps


class Workspace(NamedTuple):
    """Scratch memory of one call, all int32; every call writes it anew.

    Attributes:
        order_E: the experts in use, then anything.
        used_E: 1 for those that some token activates, else 0.
        length: number of experts in use; ``[1]``.
        arrivals: for each block of columns of the down kernel, how many of its programs are done; starts at 0.
    """

    order_E: Tensor
    used_E: Tensor
    length: Tensor
    arrivals: Tensor


def workspace(experts: int, column_blocks: int, device: torch.device) -> Workspace:
    """Uninitialised scratch memory, in one allocation."""
    sizes = [experts, experts, 1, column_blocks]
    return Workspace(*torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes))


@triton.jit
def clear(used_ptr, count_ptr, arrivals_ptr, first, last, column_blocks):
    """Set ``used`` from ``first`` to ``last - 1`` to 0 and, where ``first`` is 0, the count and the arrivals."""
    i = tl.arange(0, 128)
    for start in range(first, last, 128):
        tl.store(used_ptr + start + i, tl.zeros((128,), tl.int32), mask=start + i < last)
    if first == 0:
        tl.store(count_ptr, 0)
        for start in range(0, column_blocks, 128):
            tl.store(arrivals_ptr + start + i, tl.zeros((128,), tl.int32), mask=start + i < column_blocks)


@triton.jit
def places(used_ptr, E, BLOCK_E: tl.constexpr):
    """Place of every expert in the list of those in use, or -1; and how many there are."""
    j = tl.arange(0, BLOCK_E)
    used = tl.load(used_ptr + j, mask=j < E, other=0)
    return tl.where(used != 0, tl.cumsum(used, axis=0) - 1, -1), tl.sum(used, axis=0)


@triton.jit
def write_order(place, count, order_ptr, count_ptr, BLOCK_E: tl.constexpr):
    """Store the list of experts in use, from what :func:`places` answers."""
    tl.store(order_ptr + place, tl.arange(0, BLOCK_E), mask=place >= 0)
    tl.store(count_ptr, count)


@triton.jit
def _list(
    mask_ptr,
    order_ptr,
    used_ptr,
    count_ptr,
    arrivals_ptr,
    T,
    E,
    column_blocks,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    t, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    mask = tl.load(mask_ptr + t[:, None] * E + j[None, :], mask=(t < T)[:, None] & (j < E)[None, :], other=0)
    clear(used_ptr, count_ptr, arrivals_ptr, 0, E, column_blocks)
    tl.debug_barrier()  # what was cleared is now written again, and read, by other threads
    tl.store(used_ptr + j, tl.max(mask.to(tl.int32), axis=0), mask=j < E)
    tl.debug_barrier()
    place, count = places(used_ptr, E, BLOCK_E)
    write_order(place, count, order_ptr, count_ptr, BLOCK_E)


def list_experts(mask_TE: Tensor, work: Workspace) -> None:
    """Fill ``work`` from a bool mask ``[T, E]`` of few tokens."""
    T, E = mask_TE.shape
    _list[(1,)](
        mask_TE.view(torch.uint8),
        *work,
        T,
        E,
        work.arrivals.numel(),
        BLOCK_T=triton.next_power_of_2(T),
        BLOCK_E=triton.next_power_of_2(E),
        OVERLAP=overlaps(mask_TE),
        num_warps=8,
        **launch_options(mask_TE),
    )
