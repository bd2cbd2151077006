"""The FFNs that ``prunepath bench ffn`` times: random ones of a geometry, or a model's own.

Shapes: T tokens, N tokens to draw from, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.bench.geometry import Geometry
from torch_prunepath.config import Rule, num_experts
from torch_prunepath.ops import sparse_ffn as fused
from torch_prunepath.ops.experts import expand_experts
from torch_prunepath.ops.operators import router_scores, select_experts
from torch_prunepath.search import tau_of_scores
from torch_prunepath.weights import FFNWeights

SCORE_SPREAD = 3.0
"""Standard deviation of a random router's scores over the experts. A guess: no trained router's was recorded."""

LAYOUTS = ("linear", "rows")
"""Layouts in which the dense computation may store down: ``[D, F]`` as in ``nn.Linear``, or ``[F, D]``, a row for each
neuron."""


@dataclass(frozen=True)
class TimedFFN:
    """One FFN with its router; the fields are arguments of :func:`torch_prunepath.ops.sparse_ffn.sparse_ffn`.

    Attributes:
        down_DF: a copy of down in the layout of ``nn.Linear``, for the dense computation.
    """

    up_FD: Tensor
    up_bias_F: Tensor | None
    gate_FD: Tensor | None
    gate_bias_F: Tensor | None
    down_FD: Tensor
    down_bias_D: Tensor | None
    down_DF: Tensor
    router_ED: Tensor
    router_bias_E: Tensor | None
    tau: Tensor
    rule: Rule
    gate_offset: float | None
    activation: str
    expert_size: int
    router_norm: bool = False
    shared: int = 0

    @property
    def ffn_size(self) -> int:
        """Number of neurons, F."""
        return self.up_FD.shape[0]

    @property
    def weights(self) -> FFNWeights:
        """All weights of the FFN, with down as rows ``[F, D]``."""
        return FFNWeights(self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F, self.down_FD, self.down_bias_D)

    def sparse(self, x_TD: Tensor) -> Tensor:
        """Compute the sparse output, which is timed as ours: ``[T, D] -> [T, D]``."""
        return fused.sparse_ffn(
            x_TD,
            self.router_ED,
            self.router_bias_E,
            self.tau,
            self.rule,
            self.gate_offset,
            *self.weights,
            self.activation,
            self.expert_size,
            self.router_norm,
            self.shared,
        )

    def dense(self, x_TD: Tensor, layout: str) -> Tensor:
        """Compute the dense output with plain torch, without router, down stored in one of ``LAYOUTS``: ``[T, D]``."""
        act = ACTIVATIONS[self.activation]
        up_TF = nnf.linear(x_TD, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            h_TF = act(up_TF)
        else:
            h_TF = act(nnf.linear(x_TD, self.gate_FD, self.gate_bias_F)) * up_TF
        return nnf.linear(h_TF, self.down_DF if layout == "linear" else self.down_FD.t(), self.down_bias_D)

    def mask(self, x_TD: Tensor) -> Tensor:
        """Compute which experts are active, bool ``[T, E]``."""
        return select_experts(self.scores(x_TD), self.tau, self.rule, self.shared)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Compute the router scores, float32 ``[T, E]``."""
        return router_scores(x_TD, self.router_ED, self.router_bias_E, self.router_norm)

    def set_sparsity(self, x_TD: Tensor, sparsity: float) -> None:
        """Set tau so that this share of the experts is inactive, averaged over these tokens; 0 sets tau = 1."""
        self.tau.fill_(tau_of_scores(self.scores(x_TD), sparsity, self.rule, self.shared))

    @property
    def neuron_bytes(self) -> int:
        """Bytes of all neurons' weights and biases."""
        tensors = (self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F, self.down_FD)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def router_bytes(self) -> int:
        """Bytes of the router's weight and bias."""
        return self.router_ED.nbytes + (0 if self.router_bias_E is None else self.router_bias_E.nbytes)


@dataclass(frozen=True)
class Usage:
    """The part of a layer that a batch uses.

    Attributes:
        sparsity: inactive share of the neurons, averaged over tokens.
        union: share of the neurons that at least one token activates.
    """

    sparsity: float
    union: float

    @classmethod
    @torch.no_grad()
    def of(cls, mask_TE: Tensor, expert_size: int, ffn_size: int) -> Usage:
        """Compute the usage from one selection of experts, bool ``[T, E]``."""
        active_TF = expand_experts(mask_TE, expert_size, ffn_size)
        return cls(1.0 - float(active_TF.float().mean()), float(active_TF.any(0).float().mean()))

    @classmethod
    def mean(cls, usages: Sequence[Usage]) -> Usage:
        """Average several usages."""
        count = len(usages)
        return cls(sum(usage.sparsity for usage in usages) / count, sum(usage.union for usage in usages) / count)


def random_layer(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, expert_size: int, gate: str, seed: int
) -> TimedFFN:
    """Make an FFN of the geometry with random weights, N(0, 1 / fan-in), and a random router.

    On inputs N(0, 1), the router's scores have the standard deviation ``SCORE_SPREAD``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    D, F = geometry.hidden_size, geometry.ffn_size

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

    down_FD = normal(F, D, scale=1 / math.sqrt(F))
    return TimedFFN(
        up_FD=normal(F, D, scale=1 / math.sqrt(D)),
        up_bias_F=normal(F, scale=0.1) if geometry.plain else None,
        gate_FD=None if geometry.plain else normal(F, D, scale=1 / math.sqrt(D)),
        gate_bias_F=None,
        down_FD=down_FD,
        down_bias_D=normal(D, scale=0.1) if geometry.plain else None,
        down_DF=down_FD.t().contiguous(),
        router_ED=normal(num_experts(F, expert_size), D, scale=SCORE_SPREAD / math.sqrt(D)),
        router_bias_E=None,
        tau=torch.ones((), device=device),
        rule="reach",
        gate_offset=None if gate == "one" else 0.0,
        activation=geometry.activation,
        expert_size=expert_size,
    )
