"""All neurons of an FFN on a CPU, active or not: what is done where gathering does not pay.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

CELL_BYTES = 16
"""Size of the widest element that torch can fill, complex128: the fewer elements, the quicker they are masked."""


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """Linear layer ``x W^T + b``, its weight of any strides.

    In float32 through oneDNN, which torch keeps for lower precisions: at 1 to 512 tokens it was measured to be 1.5 to 3
    times as fast as MKL on an AMD processor; no other maker's was tried.
    """
    # A single token's product with a transposed weight is the exception.
    suits = len(x_TD) > 1 or (len(x_TD) == 1 and weight_FD.stride(1) == 1)
    if x_TD.dtype == weight_FD.dtype == torch.float32 and suits and _has_onednn():
        bias_F = None if bias_F is None else bias_F.float()
        y_TF: Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, weight_FD, bias_F, "none", [], "")
        return y_TF
    return nnf.linear(x_TD, weight_FD, bias_F)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def mask_(h_TF: Tensor, mask_TE: Tensor, expert_size: int) -> Tensor:
    """Sets the neurons of inactive experts to 0, in place."""
    off_TE = ~mask_TE
    for h_TES, part_TE in _by_expert(h_TF, off_TE, expert_size):
        # Not a product: an inactive neuron that overflowed must not turn into NaN.
        _as_cells(h_TES).masked_fill_(part_TE.unsqueeze(-1), 0)
    return h_TF


def _as_cells(h_TES: Tensor) -> Tensor:
    """The same memory as fewer and wider elements, for what does not look at their values; as it is if that is odd."""
    per_cell = CELL_BYTES // h_TES.element_size()
    numbers = (h_TES.shape[-1], h_TES.storage_offset(), *h_TES.stride()[:-1])
    if h_TES.stride(-1) != 1 or any(n % per_cell for n in numbers) or h_TES.data_ptr() % CELL_BYTES:
        return h_TES
    return h_TES.view(torch.complex128)


def weigh_(h_TF: Tensor, weights_TE: Tensor | None, expert_size: int) -> Tensor:
    """Multiplies every neuron by its expert's weight, None being 1, in place."""
    if weights_TE is not None:
        for h_TES, part_TE in _by_expert(h_TF, weights_TE.to(h_TF.dtype), expert_size):
            h_TES.mul_(part_TE.unsqueeze(-1))
    return h_TF


def _by_expert(h_TF: Tensor, values_TE: Tensor, expert_size: int) -> list[tuple[Tensor, Tensor]]:
    """Views ``[T, E, S]`` of h and the ``[T, E]`` that belong to them: the whole experts, then a smaller last one."""
    whole = h_TF.shape[1] // expert_size
    cut = whole * expert_size
    parts = [(h_TF[:, :cut].unflatten(1, (whole, expert_size)), values_TE[:, :whole])] if whole else []
    if cut < h_TF.shape[1]:
        parts.append((h_TF[:, cut:].unsqueeze(1), values_TE[:, whole:]))
    return parts
