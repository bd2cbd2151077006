"""All neurons of an FFN on a CPU, active or not, and the router's scores: what is done where gathering does not pay.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.ops.cpu.packs import Name, Packs
from torch_prunepath.ops.cpu.packs import linear as packed_linear
from torch_prunepath.rms import EPSILON, inverse_rms

CACHED_BYTES = 2 << 20
"""Router weights of lower precision are converted in blocks of this size."""

CELL_BYTES = 16
"""Of the widest element that torch can fill."""


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """``x W^T + b``; weights of any strides.

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


def hidden_of_all(
    x_TD: Tensor,
    up_FD: Tensor,
    up_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_F: Tensor | None,
    activation: str,
    packs: Packs | None = None,
) -> Tensor:
    """Hidden activation of every neuron, active or not: ``[T, F]``, a tensor of its own."""
    gate_TF = None if gate_FD is None else _projected(x_TD, "gate", gate_FD, gate_F, packs)
    return activate(_projected(x_TD, "up", up_FD, up_F, packs), gate_TF, activation)


def _projected(x_TD: Tensor, name: Name, weight_FD: Tensor, bias_F: Tensor | None, packs: Packs | None) -> Tensor:
    packed_FD = None if packs is None else packs.of(name, weight_FD)
    return linear(x_TD, weight_FD, bias_F) if packed_FD is None else packed_linear(x_TD, packed_FD, bias_F)


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


def scale_(h_TF: Tensor, gates_TE: Tensor | None, expert_size: int) -> Tensor:
    """Multiplies every neuron by its expert's gate, in place."""
    if gates_TE is not None:
        for h_TES, part_TE in _by_expert(h_TF, gates_TE.to(h_TF.dtype), expert_size):
            h_TES.mul_(part_TE.unsqueeze(-1))
    return h_TF


def _by_expert(h_TF: Tensor, values_TE: Tensor, expert_size: int) -> list[tuple[Tensor, Tensor]]:
    """Views ``[T, E, S]`` of h with the ``[T, E]`` that belong to them: of the whole experts, and of a smaller last."""
    whole = h_TF.shape[1] // expert_size
    cut = whole * expert_size
    parts = [(h_TF[:, :cut].unflatten(1, (whole, expert_size)), values_TE[:, :whole])] if whole else []
    if cut < h_TF.shape[1]:
        parts.append((h_TF[:, cut:].unsqueeze(1), values_TE[:, whole:]))
    return parts


def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``act(gate) * up``, or ``act(up)``, or ``up`` where the activation is ``"none"``."""
    if activation == "none":
        return up
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate).mul_(up)


# --- router -----------------------------------------------------------------------------------------------------------


def scores(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, normalise: bool = False, packs: Packs | None = None
) -> Tensor:
    """``x W^T + b`` in float32: ``[T, E]``. A large weight is converted block by block, within the cache.

    With ``normalise``, x is divided by its root mean square.
    """
    x_TD = x_TD.float()
    packed_ED = None if packs is None else packs.of("router", weight_ED)
    if packed_ED is not None:
        scores_TE = packed_linear(x_TD, packed_ED, None)
    elif weight_ED.dtype == torch.float32 or 4 * weight_ED.numel() <= CACHED_BYTES:
        scores_TE = _product(x_TD, weight_ED.float())
    else:
        size = max(1, CACHED_BYTES // (4 * weight_ED.shape[1]))
        scores_TE = torch.cat([_product(x_TD, block.float()) for block in weight_ED.split(size)], dim=1)
    if normalise:
        scores_TE.mul_(_inverse_rms_of_one(x_TD) if len(x_TD) == 1 else inverse_rms(x_TD))
    return scores_TE if bias_E is None else scores_TE.add_(bias_E)


def _inverse_rms_of_one(x_1D: Tensor) -> float:
    """:func:`inverse_rms` of a single token: as a number, without five operators on a single element."""
    return 1 / math.sqrt(float(torch.linalg.vector_norm(x_1D)) ** 2 / x_1D.shape[1] + EPSILON)


def _product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    # MKL is the faster one at few tokens and small weights.
    few = len(x_TD) * weight_ED.numel() < 1 << 18
    return nnf.linear(x_TD, weight_ED) if few else linear(x_TD, weight_ED, None)
