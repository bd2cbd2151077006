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
"""Standard deviation of a random router's scores over the experts."""

LAYOUTS = ("linear", "rows")
"""How the dense computation may store down: ``[D, F]`` as ``nn.Linear`` does, or a neuron's row at a time."""


@dataclass(frozen=True)
class Layer:
    """One FFN with its router; arguments as in :func:`torch_prunepath.ops.sparse_ffn.sparse_ffn`.

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
        """F."""
        return self.up_FD.shape[0]

    @property
    def weights(self) -> FFNWeights:
        """All weights of the FFN, down as rows."""
        return FFNWeights(self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F, self.down_FD, self.down_bias_D)

    def sparse(self, x_TD: Tensor) -> Tensor:
        """What is timed as ours."""
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
        """What is timed as dense: plain torch, all neurons, no router; down stored in one of ``LAYOUTS``."""
        act = ACTIVATIONS[self.activation]
        up_TF = nnf.linear(x_TD, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            h_TF = act(up_TF)
        else:
            h_TF = act(nnf.linear(x_TD, self.gate_FD, self.gate_bias_F)) * up_TF
        return nnf.linear(h_TF, self.down_DF if layout == "linear" else self.down_FD.t(), self.down_bias_D)

    def mask(self, x_TD: Tensor) -> Tensor:
        """Active experts, bool ``[T, E]``."""
        return select_experts(self.scores(x_TD), self.tau, self.rule, self.shared)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router scores, float32 ``[T, E]``."""
        return router_scores(x_TD, self.router_ED, self.router_bias_E, self.router_norm)

    def set_sparsity(self, x_TD: Tensor, sparsity: float) -> None:
        """Put tau where this share of the experts is inactive, averaged over these tokens; 0 is tau = 1."""
        self.tau.fill_(tau_of_scores(self.scores(x_TD), sparsity, self.rule, self.shared))

    @property
    def neuron_bytes(self) -> int:
        """Bytes of the weights and biases of all neurons."""
        tensors = (self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F, self.down_FD)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def router_bytes(self) -> int:
        """Bytes of the router."""
        return self.router_ED.nbytes + (0 if self.router_bias_E is None else self.router_bias_E.nbytes)


@dataclass(frozen=True)
class Usage:
    """What a batch uses of a layer: inactive share of neurons averaged over tokens, and what any token activates."""

    sparsity: float
    union: float

    @classmethod
    @torch.no_grad()
    def of(cls, mask_TE: Tensor, expert_size: int, ffn_size: int) -> Usage:
        """From one selection."""
        active_TF = expand_experts(mask_TE, expert_size, ffn_size)
        return cls(1.0 - float(active_TF.float().mean()), float(active_TF.any(0).float().mean()))

    @classmethod
    def mean(cls, usages: Sequence[Usage]) -> Usage:
        """Averaged over layers."""
        count = len(usages)
        return cls(sum(usage.sparsity for usage in usages) / count, sum(usage.union for usage in usages) / count)


def random_layer(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, expert_size: int, gate: str, seed: int
) -> Layer:
    """An FFN of the geometry: weights N(0, 1 / fan-in), routers whose scores spread by ``SCORE_SPREAD`` on N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    D, F = geometry.hidden_size, geometry.ffn_size

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

    down_FD = normal(F, D, scale=1 / math.sqrt(F))
    return Layer(
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
