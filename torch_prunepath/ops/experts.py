"""Turning one value an expert into one value a neuron, and back.

Shapes: T tokens, N anything, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.config import num_experts


def expand_experts(values_TE: Tensor, expert_size: int, ffn_size: int) -> Tensor:
    """Give every neuron its expert's value: ``[T, E] -> [T, F]``."""
    T, E = values_TE.shape
    return values_TE.unsqueeze(-1).expand(T, E, expert_size).reshape(T, E * expert_size)[:, :ffn_size]


def expert_sums(values_NF: Tensor, expert_size: int) -> Tensor:
    """Sum over each expert's neurons, in float32 or wider: ``[..., F] -> [..., E]``."""
    experts = num_experts(values_NF.shape[-1], expert_size)
    wide_NF = values_NF.to(torch.promote_types(values_NF.dtype, torch.float32))
    padded = nnf.pad(wide_NF, (0, experts * expert_size - wide_NF.shape[-1]))
    return padded.unflatten(-1, (experts, expert_size)).sum(-1)


def zero_inactive(h_TF: Tensor, mask_TE: Tensor, expert_size: int) -> Tensor:
    """Set the neurons of inactive experts to 0: ``[T, F] -> [T, F]``."""
    # masked_fill, not a product: an inactive neuron that overflowed must not turn into NaN.
    if h_TF.shape[1] == mask_TE.shape[1] * expert_size:
        return h_TF.unflatten(1, (mask_TE.shape[1], expert_size)).masked_fill(~mask_TE.unsqueeze(-1), 0).flatten(1)
    return h_TF.masked_fill(~expand_experts(mask_TE, expert_size, h_TF.shape[1]), 0)


def weigh(h_TF: Tensor, weights_TE: Tensor | None, expert_size: int) -> Tensor:
    """Multiply every neuron by its expert's weight, None being 1: ``[T, F]`` in the dtype of ``h_TF``."""
    return h_TF if weights_TE is None else h_TF * expand_experts(weights_TE, expert_size, h_TF.shape[1]).to(h_TF.dtype)
