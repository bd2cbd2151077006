"""Activation functions that a sparse FFN may apply, by canonical name.

Every entry maps 0 to 0: a neuron whose pre-activation is zeroed contributes nothing, which the split layers rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as nnf
from torch import Tensor

QUICK_GELU_SLOPE = 1.702
"""Slope with which a sigmoid comes nearest to the normal distribution's function (arXiv 1606.08415, section 2)."""


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return nnf.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return nnf.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """GELU in its sigmoid approximation, ``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": nnf.silu,
        "gelu": nnf.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": nnf.relu,
        "relu2": relu2,
        "quick_gelu": quick_gelu,
    }
)
"""Activation functions by the names that an ``FFNSpec`` gives them."""


def activate(up: Tensor, gate: Tensor | None, activation: str, *, reuse: bool = False) -> Tensor:
    """Hidden activations: ``act(gate) * up``, or ``act(up)`` in a plain FFN, or ``up`` if there is no activation.

    Args:
        up: what up (or fc1) answers, any shape.
        gate: what gate answers, of the same shape; None in a plain FFN.
        activation: key of :data:`ACTIVATIONS`; or ``"none"``, and then ``gate`` must be None.
        reuse: whether the product may take the memory of ``act(gate)``: quicker, but autograd cannot go through it.
    """
    if activation == "none":
        return up
    act = ACTIVATIONS[activation]
    if gate is None:
        return act(up)
    return act(gate).mul_(up) if reuse else act(gate) * up


def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 2 * nnf.relu(x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(QUICK_GELU_SLOPE * x)
    return grad * (s + QUICK_GELU_SLOPE * x * s * (1 - s))


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
