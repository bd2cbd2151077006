"""Activation functions that a sparse FFN may apply, by canonical name.

Every entry maps 0 to 0: a neuron whose pre-activation is zeroed contributes nothing, which the split layers rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": F.relu,
        "relu2": relu2,
        "quick_gelu": quick_gelu,
    }
)


def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 2 * F.relu(x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


ACTIVATION_BACKWARDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "silu": torch.ops.aten.silu_backward,
        "gelu": torch.ops.aten.gelu_backward,
        "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
        "relu": lambda grad, x: grad * (x > 0),
        "relu2": _relu2_backward,
        "quick_gelu": _quick_gelu_backward,
    }
)
"""``(grad_output, input) -> grad_input`` of every activation: operators run below autograd and need their own."""
