"""The size of a token, which a router may be told not to see.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""The number added to the mean square before its root is taken, as in the norms of most models."""


def inverse_rms(x_TD: Tensor) -> Tensor:
    """``1 / sqrt(mean(x^2) + EPSILON)`` of each token, float32: ``[T, D] -> [T, 1]``."""
    # In one pass over half precision; a cast from float64 must be one of its own.
    x_TD = x_TD.float() if x_TD.dtype == torch.float64 else x_TD
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm_T1.square() / x_TD.shape[-1] + EPSILON).rsqrt()


def normalised(x_TD: Tensor) -> Tensor:
    """Tokens as a router with ``router_norm`` reads them, each divided by its root mean square: ``[T, D]`` float32."""
    return x_TD.float() * inverse_rms(x_TD)
