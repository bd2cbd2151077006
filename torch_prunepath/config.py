"""Frozen values that describe a sparse model; they are validated where they are built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

FORMAT_VERSION = 2
"""Format of the manifest in a checkpoint's config.json. Format 1 wrote every layer in full; format 2 writes what layers
share only once."""

Rule = Literal["reach", "below"]
Gate = Literal["one", "sigmoid"]
Partition = Literal["coactivation", "kmeans", "contiguous", "random"]
RouterInit = Literal["fitted", "centroid", "zero"]
Budget = Literal["sensitivity", "uniform"]


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError unless ``value`` is one of the ``Literal`` type's ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(map(repr, get_args(choices)))}")


def _as_number(name: str, value: Any, example: str) -> float:
    """Return a number, or an array's only one, as a float; text is none, although Python could read it."""
    array = getattr(value, "ndim", None) or 0
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__") or array:
        raise TypeError(f"{name}={value!r} is no number: give one such as {example}")
    return float(value)


def check_tau(tau: float) -> float:
    """Return ``tau`` as a float.

    Raises:
        ValueError: if tau is not in (0, 1].
        TypeError: if tau is no number.
    """
    tau = _as_number("tau", tau, "0.9")
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau={tau} is outside (0, 1]: 1 activates every expert, smaller values activate fewer")
    return tau


def check_seed(seed: int) -> None:
    """Raise ValueError unless ``seed`` fits into 64 bits, which is what torch takes."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed={seed} is out of range: torch takes seeds from -2**63 to 2**63 - 1")


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return ``sparsity``, the inactive share of neurons, as a float.

    Args:
        sparsity: the sparsity that was asked for.
        name: its name for the message: a parameter, a command's option, or words.

    Raises:
        ValueError: if sparsity is not in [0, 1).
        TypeError: if sparsity is no number.
    """
    sparsity = _as_number(name, sparsity, "0.8")
    if not 0.0 <= sparsity < 1.0:
        says = f"{name} {sparsity}" if " " in name or name.startswith("--") else f"{name}={sparsity}"
        raise ValueError(f"{says} is outside [0, 1): 0 is dense, 0.8 leaves a fifth of the neurons active")
    return sparsity


LARGEST_THRESHOLD = (2 - 2**-23) * 2.0**127
"""The largest float32 number: layers keep their thresholds in float32."""


def check_bytes(value: Any, name: str = "bytes") -> float:
    """Return a share of the bytes of all FFNs, such as a budget, as a float.

    Raises:
        ValueError: if it is no number in (0, 1].
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) <= 1:
        raise ValueError(f"{name}={value!r} is outside (0, 1]: 1 reads every weight, 0.5 half of the FFNs' bytes")
    return float(value)


def check_threshold(value: Any) -> float:
    """Return a threshold as a float.

    Raises:
        ValueError: if it is no finite number of at least 0.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"a threshold must be a number of at least 0, not {value!r}")
    if not 0 <= float(value) <= LARGEST_THRESHOLD:
        raise ValueError(
            f"a threshold must be a finite float32 number of at least 0, not {value}: 0 leaves nothing out"
        )
    return float(value)


@dataclass(frozen=True)
class FFNSpec:
    """The place of one feed-forward network in a model, and the formula that it computes.

    A gated one computes ``down(act(gate(x)) * up(x))``, a plain one ``down(act(up(x)))``. Module names are relative to
    ``name``.

    Attributes:
        name: qualified name of the owner, the module that holds every part.
        split: False if the owner's ``forward(x)`` is exactly this FFN (dropouts apart), so that the owner itself is
            made sparse; True if the owner does more, so that ``up`` and ``down`` are made sparse one by one.
        up: the linear layer ``[D] -> [F]`` (fc1 of a plain FFN), or ``[D] -> [2F]`` if ``fused``.
        down: the linear layer ``[F] -> [D]``.
        gate: the gate's own linear layer; None if the FFN is plain or ``fused``.
        fused: None, or the order of the two halves in ``up``'s output features: ``"gate_up"`` or ``"up_gate"``.
        activation: key of :data:`torch_prunepath.activations.ACTIVATIONS`.
        hidden_dropout: dropout applied to ``down``'s input, if any (only named where ``split`` is False).
        output_dropout: dropout applied to ``down``'s output, if any (only named where ``split`` is False); or, where
            ``forward`` calls one that is no module, the share of values that it leaves out in training.
        hidden_size: the size of the FFN's input and output, D.
        ffn_size: the number of neurons, F.
    """

    name: str
    up: str
    down: str
    activation: str
    hidden_size: int
    ffn_size: int
    split: bool = False
    gate: str | None = None
    fused: Literal["gate_up", "up_gate"] | None = None
    hidden_dropout: str | None = None
    output_dropout: str | float | None = None

    def __post_init__(self) -> None:
        # Here, so that settings can be read without torch: a command's help is there at once.
        from torch_prunepath.activations import ACTIVATIONS

        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known: choose one of {', '.join(ACTIVATIONS)}")
        if self.gate is not None and self.fused is not None:
            raise ValueError(f"{self.name}: an FFN has a gate layer of its own or a fused one, not both")
        if self.fused not in (None, "gate_up", "up_gate"):
            raise ValueError(f"fused={self.fused!r} is not known: choose None, 'gate_up' or 'up_gate'")
        if isinstance(self.output_dropout, float) and not 0.0 < self.output_dropout <= 1.0:
            raise ValueError(f"{self.name}: output_dropout={self.output_dropout} is outside (0, 1]")
        if self.hidden_size < 1 or self.ffn_size < 1:
            raise ValueError(f"{self.name}: hidden_size and ffn_size must be positive")

    @property
    def gated(self) -> bool:
        """Whether ``act(gate(x))`` multiplies ``up(x)``."""
        return self.gate is not None or self.fused is not None


@dataclass(frozen=True)
class SparsifyConfig:
    """The settings with which :func:`torch_prunepath.sparsify` builds experts and routers.

    Attributes:
        expert_size: S, neurons an expert. The last expert is smaller where F is no multiple of S.
        partition: how neurons are grouped (see :mod:`torch_prunepath.experts.partition`).
        router: how routers start (see :mod:`torch_prunepath.layer.router`).
        router_norm: whether a router reads each token divided by its root mean square, so that the size of a token does
            not decide how sure the router is. Nothing is learnt for it.
        shared_experts: the first k experts of each layer, always active and with gate 1; the router chooses among the
            others (DeepSeekMoE, arXiv 2401.06066). They hold the neurons that contribute most on calibration data.
            Below 1 it is a share of each layer's experts, rounded: 0.05 of 192 is 10.
        rule: ``"reach"``: the smallest top-ranked set whose mass reaches tau; ``"below"``: the set whose mass stays
            below tau, and the top expert (the rule of the PrunePath authors' released code).
        gate: weight of an active expert's output: ``"one"``, or ``"sigmoid"`` of its score (arXiv 2605.28283).
        gate_offset: constant added to every score inside the sigmoid gate, which softmax would not see.
        budget: ``"uniform"``: one tau for all layers; ``"sensitivity"``: each layer's tau is computed from the model's
            by how much it costs the layer to lose mass, measured on the calibration data (see
            :mod:`torch_prunepath.experts.budget`).
        calibration_tokens: largest number of tokens taken from the calibration data.
        seed: seed of everything random in the conversion.
    """

    expert_size: int = 8
    partition: Partition = "coactivation"
    router: RouterInit = "fitted"
    router_norm: bool = False
    shared_experts: int | float = 0
    rule: Rule = "reach"
    gate: Gate = "one"
    gate_offset: float = 0.0
    budget: Budget = "sensitivity"
    calibration_tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("partition", self.partition, Partition)
        check_choice("router", self.router, RouterInit)
        check_choice("rule", self.rule, Rule)
        check_choice("gate", self.gate, Gate)
        check_choice("budget", self.budget, Budget)
        if not isinstance(self.router_norm, bool):
            raise ValueError(f"router_norm={self.router_norm!r} must be True or False")
        if self.expert_size < 1:
            raise ValueError(f"expert_size={self.expert_size} must be at least 1")
        if not self.shared_experts >= 0:
            raise ValueError(f"shared_experts={self.shared_experts} must not be negative: 0 is none")
        if self.shared_experts >= 1 and not isinstance(self.shared_experts, int):
            raise ValueError(f"shared_experts={self.shared_experts} is no whole number, and no share below 1")
        if self.calibration_tokens < 1:
            raise ValueError(f"calibration_tokens={self.calibration_tokens} must be at least 1")
        if not math.isfinite(self.gate_offset):
            raise ValueError(f"gate_offset={self.gate_offset} must be a finite number")
        check_seed(self.seed)
        if self.gate == "one" and self.gate_offset != 0.0:
            raise ValueError("gate_offset moves the sigmoid gate: set gate='sigmoid' with it, or leave it 0")

    @property
    def needs_data(self) -> bool:
        """Whether any of the choices needs calibration data."""
        choices = self.partition == "coactivation", self.router == "fitted", self.budget == "sensitivity"
        return any(choices) or self.shared_experts > 0

    def num_shared(self, ffn_size: int) -> int:
        """Return the number of shared experts of a layer with ``ffn_size`` neurons."""
        if isinstance(self.shared_experts, int):
            return self.shared_experts
        return round(self.shared_experts * num_experts(ffn_size, self.expert_size))


def num_experts(ffn_size: int, expert_size: int) -> int:
    """Return the number of experts, ceil(F / S)."""
    return -(-ffn_size // expert_size)
