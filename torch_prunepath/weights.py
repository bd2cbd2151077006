"""What a sparse FFN is given beside its tokens, as the values that every implementation takes.

Shapes: T tokens, D hidden size, F neurons, E experts. Weights are *rows* ``[F, D]``: one neuron's D numbers each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.config import Rule


class UpWeights(NamedTuple):
    """The weights that make hidden activations: those of up (or fc1) and, in a gated FFN, those of gate.

    Attributes:
        up_FD: rows ``[F, D]``, any strides, in the dtype of the tokens.
        up_bias_F: ``[F]``, or None.
        gate_FD: rows as ``up_FD``; None in a plain FFN.
        gate_bias_F: ``[F]``, or None.
    """

    up_FD: Tensor
    up_bias_F: Tensor | None = None
    gate_FD: Tensor | None = None
    gate_bias_F: Tensor | None = None

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What up and gate answer for every neuron, ``[T, F]`` each; None for the gate of a plain FFN."""
        up_TF = nnf.linear(x_TD, self.up_FD, self.up_bias_F)
        return up_TF, None if self.gate_FD is None else nnf.linear(x_TD, self.gate_FD, self.gate_bias_F)

    def to(self, dtype: torch.dtype) -> UpWeights:
        """The same weights in another dtype."""
        return UpWeights(self.up_FD.to(dtype), *(None if part is None else part.to(dtype) for part in self[1:]))


class FFNWeights(NamedTuple):
    """All weights of an FFN, gated or plain.

    Attributes:
        up_FD: up (fc1) rows ``[F, D]``, any strides, in the dtype of the tokens.
        up_bias_F: ``[F]``, or None.
        gate_FD: gate rows as ``up_FD``; None in a plain FFN.
        gate_bias_F: ``[F]``, or None.
        down_FD: down (fc2) rows as ``up_FD``.
        down_bias_D: ``[D]``, or None.
    """

    up_FD: Tensor
    up_bias_F: Tensor | None
    gate_FD: Tensor | None
    gate_bias_F: Tensor | None
    down_FD: Tensor
    down_bias_D: Tensor | None

    @property
    def up_part(self) -> UpWeights:
        """The weights that make hidden activations."""
        return UpWeights(self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F)


class Threshold(NamedTuple):
    """Which entries of a token's vector count: those that are not too small, see ``select.uncounted``.

    Attributes:
        theta: 0-d float32; 0 lets every entry count.
        norm_N: float32 ``[N]``, the norm of the weights that each entry is multiplied by.
    """

    theta: Tensor
    norm_N: Tensor

    @classmethod
    def of(cls, theta: Tensor | None, norm_N: Tensor | None) -> Threshold | None:
        """The threshold of an operator's two arguments, None if it was given none."""
        return None if theta is None or norm_N is None else cls(theta, norm_N)


class Thresholds(NamedTuple):
    """What an FFN leaves out inside its active experts; None: nothing.

    Attributes:
        inputs: which channels of a token gate and up (or fc1) read.
        neurons: which hidden activations down (or fc2) reads.
    """

    inputs: Threshold | None = None
    neurons: Threshold | None = None

    @classmethod
    def of(cls, *parts: Tensor | None) -> Thresholds:
        """The inverse of :attr:`parts`; parts at the end may be missing."""
        theta_x, column_norm_D, theta_h, row_norm_F = [*parts, *[None] * 4][:4]
        return cls(Threshold.of(theta_x, column_norm_D), Threshold.of(theta_h, row_norm_F))

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """Theta and norm of inputs, then of neurons, as operators list them."""
        inputs: tuple[Tensor | None, Tensor | None] = self.inputs or (None, None)
        neurons: tuple[Tensor | None, Tensor | None] = self.neurons or (None, None)
        return *inputs, *neurons


EVERYTHING = Thresholds()
"""No thresholds: every input and every neuron counts."""


class Selector(NamedTuple):
    """What chooses the experts of a token and weighs their outputs: a router, tau and the rule.

    Attributes:
        router_ED: router weight ``[E, D]``, any floating dtype.
        router_bias_E: ``[E]``, or None.
        tau: 0-d float32; how much probability the active experts must have.
        rule: ``"reach"`` or ``"below"``, see :func:`torch_prunepath.select.select_experts`.
        gate_offset: the weight of an active expert's output is ``sigmoid(score + gate_offset)``; None: it is 1.
        router_norm: whether the router reads tokens divided by their root mean square.
        shared: so many experts, the first ones, are active whatever their scores, with weight 1.
    """

    router_ED: Tensor
    router_bias_E: Tensor | None
    tau: Tensor
    rule: Rule
    gate_offset: float | None
    router_norm: bool = False
    shared: int = 0
