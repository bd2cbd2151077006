"""``TrainConfig``, the frozen value that says how a sparse model is trained; it is validated where it is built."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch_prunepath.config import check_choice, check_seed
from torch_prunepath.train.schedule import Phase, hold

Train = Literal["all", "routers"]
Decay = Literal["cosine", "linear", "constant"]

LOSSES = ("task", "entropy", "load_balance", "lte_separation", "contribution_fit", "distill_logits", "distill_ffn")
"""Names of the loss weights, in the order in which terms are reported."""
ROUTER_LOSSES = ("entropy", "load_balance", "lte_separation", "contribution_fit")
"""Names of the losses whose gradient reaches routers without going through the model's output."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings with which :func:`torch_prunepath.train.train` trains a model.

    Attributes:
        steps: optimiser steps; leave None and give ``epochs`` instead for passes over the batches.
        epochs: passes over the batches; None if ``steps`` is given.
        phases: how sparse each part of the run is; see :mod:`torch_prunepath.train.schedule`.
        train: ``"all"`` parameters that require a gradient, or ``"routers"`` alone.
        lr: peak learning rate of the model's own weights (AdamW).
        router_lr: peak learning rate of routers.
        norm_lr: peak learning rate of normalisation layers' weights; None: the same as ``lr``.
        weight_decay: weight decay of matrices; biases and normalisation layers have none.
        warmup: share of the steps over which learning rates rise from 0.
        decay: how learning rates fall afterwards, to 0 at the end: ``"cosine"``, ``"linear"``, or ``"constant"`` (not
            at all).
        accumulation: batches a step. Terms that are means over tokens come out as for one large batch; ``load_balance``
            and ``distill_ffn`` are not such means and are taken batch by batch.
        clip: largest norm of the gradient; None does not limit it.
        autocast: run the model in bfloat16 autocast; weights and optimiser keep their dtype.
        seed: seed of dropout, drawn sparsities and sampled tokens.
        task: weight of the model's own loss.
        entropy: weight of :func:`torch_prunepath.train.losses.entropy`.
        load_balance: weight of :func:`torch_prunepath.train.losses.load_balance`.
        lte_separation: weight of :func:`torch_prunepath.train.losses.lte_separation`.
        contribution_fit: weight of :func:`torch_prunepath.train.losses.contribution_fit`.
        distill_logits: weight of :func:`torch_prunepath.train.losses.distill_logits`; needs a teacher.
        distill_ffn: weight of :func:`torch_prunepath.train.losses.distill_ffn`, whose target is the layer's output with
            all of its own experts active.
        separation_eta: eta inside ``lte_separation``.
        fit_tokens: tokens that ``contribution_fit`` samples from each batch.
        fit_detached: let the gradient of ``contribution_fit`` reach the routers only.
        temperature: temperature of ``distill_logits``.
        control_rate: ``rate`` of :class:`torch_prunepath.train.controller.SparsityController`, in (0, 1).
    """

    steps: int | None = None
    epochs: float | None = None
    phases: tuple[Phase, ...] = (hold(0.5),)
    train: Train = "all"
    lr: float = 1e-4
    router_lr: float = 1e-3
    norm_lr: float | None = None
    weight_decay: float = 1e-2
    warmup: float = 0.05
    decay: Decay = "cosine"
    accumulation: int = 1
    clip: float | None = 1.0
    autocast: bool = False
    seed: int = 0
    task: float = 1.0
    entropy: float = 0.0
    load_balance: float = 0.0
    lte_separation: float = 0.0
    contribution_fit: float = 0.0
    distill_logits: float = 0.0
    distill_ffn: float = 0.0
    separation_eta: float = 1.0
    fit_tokens: int = 512
    fit_detached: bool = True
    temperature: float = 1.0
    control_rate: float = 0.3

    def __post_init__(self) -> None:
        check_choice("train", self.train, Train)
        check_choice("decay", self.decay, Decay)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps= or epochs=, and not both")
        positive = ("steps", "epochs", "lr", "router_lr", "norm_lr", "clip", "accumulation", "fit_tokens")
        for name in (*positive, "temperature"):
            value = getattr(self, name)
            _check_number(name, value)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be finite")
        for name in (*LOSSES, "weight_decay", "separation_eta"):
            _check_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative: 0 turns it off")
        if not self.losses:
            raise ValueError(f"every loss has weight 0: give one of {', '.join(LOSSES)} a weight")
        check_seed(self.seed)
        _check_number("warmup", self.warmup)
        _check_number("control_rate", self.control_rate)
        if not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"warmup={self.warmup} is outside [0, 1]: it is a share of the steps")
        if not self.phases or not all(isinstance(phase, Phase) for phase in self.phases):
            raise ValueError("phases must hold at least one Phase, for instance phases=(hold(0.7),)")
        if not 0.0 < self.control_rate < 1.0:
            raise ValueError(f"control_rate={self.control_rate} is outside (0, 1): 0.3 suits most")

    @property
    def trains_routers_apart(self) -> bool:
        """Whether a loss in ``ROUTER_LOSSES`` has a weight."""
        return bool(self.losses.keys() & set(ROUTER_LOSSES))

    @property
    def losses(self) -> dict[str, float]:
        """Weights of the losses whose weight is not 0, by name."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name)}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**dataclasses.asdict(self), "phases": [dataclasses.asdict(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """Build a config from the result of :meth:`to_dict`.

        Raises:
            ValueError: if a name is not known or a value is refused.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no field of TrainConfig: choose from {', '.join(sorted(known))}")
        phases = data.get("phases")
        made = {} if phases is None else {"phases": tuple(Phase(**phase) for phase in phases)}
        return cls(**{**data, **made})


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a number")
