"""Router scores on a CPU.

Shapes: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.ops.cpu.dense import linear
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.ops.cpu.packs import linear as packed_linear
from torch_prunepath.rms import EPSILON, inverse_rms

CACHED_BYTES = 2 << 20
"""Size of the blocks, as float32, in which router weights of lower precision are converted: so much stays in a core's
cache until the product has read it. A guess at common sizes of that cache, not a measurement."""

SMALL_PRODUCTS = 1 << 18
"""Multiplications below which MKL's product of a router is the faster one, above it oneDNN's. Found by hand on the AMD
machine of docs/log.md, "few tokens on a CPU"; the times were not kept."""


def router_scores(
    x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, router_norm: bool = False, packs: Packs | None = None
) -> Tensor:
    """Router scores ``x W^T + b`` in float32, ``[T, E]``: see :func:`torch_prunepath.ops.router_scores`.

    A large weight is converted block by block, within the cache; ``packs`` may hold a copy of it, converted.
    """
    x_TD = x_TD.float()
    packed_ED = None if packs is None else packs.of("router", router_ED)
    if packed_ED is not None:
        scores_TE = packed_linear(x_TD, packed_ED, None)
    elif router_ED.dtype == torch.float32 or 4 * router_ED.numel() <= CACHED_BYTES:
        scores_TE = _product(x_TD, router_ED.float())
    else:
        size = max(1, CACHED_BYTES // (4 * router_ED.shape[1]))
        scores_TE = torch.cat([_product(x_TD, block.float()) for block in router_ED.split(size)], dim=1)
    if router_norm:
        scores_TE.mul_(_inverse_rms_of_one(x_TD) if len(x_TD) == 1 else inverse_rms(x_TD))
    return scores_TE if router_bias_E is None else scores_TE.add_(router_bias_E)


def _inverse_rms_of_one(x_1D: Tensor) -> float:
    """:func:`inverse_rms` of a single token: as a number, without five operators on a single element."""
    return 1 / math.sqrt(float(torch.linalg.vector_norm(x_1D)) ** 2 / x_1D.shape[1] + EPSILON)


def _product(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    small = len(x_TD) * router_ED.numel() < SMALL_PRODUCTS
    return nnf.linear(x_TD, router_ED) if small else linear(x_TD, router_ED, None)
