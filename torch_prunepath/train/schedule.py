"""How sparse each step of a training run is: a tuple of phases, a pure function of seed and step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_prunepath.config import check_choice, check_sparsity, check_tau

Kind = Literal["tau", "sparsity", "random", "random-log"]


@dataclass(frozen=True)
class Phase:
    """A stretch of a training run.

    Attributes:
        kind: ``"sparsity"``: the controller holds realised sparsity at a target, which goes in a straight line from
            ``first`` to ``last``; ``"random"``: at a target drawn anew for each step, uniform between them, so that one
            checkpoint serves all of them (in one process for each batch: those that a step adds up share the range out
            among them); ``"random-log"``: likewise, but uniform in the logarithm of the share of neurons that are
            active, so that each halving of it gets as many steps; ``"tau"``: tau itself goes from ``first`` to
            ``last``, uncontrolled.
        first: sparsity in [0, 1), or tau in (0, 1].
        last: likewise.
        share: how long the phase lasts, relative to the sum over all phases.
    """

    kind: Kind
    first: float
    last: float
    share: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Kind)
        for value in (self.first, self.last):
            if self.kind == "tau":
                check_tau(value)
            else:
                check_sparsity(value, "target sparsity")
        if self.drawn and self.first > self.last:
            raise ValueError(f"draw from {self.last} to {self.first}, not from {self.first} to {self.last}")
        if not self.share > 0.0:
            raise ValueError(f"share={self.share} must be positive: leave the phase out instead")

    @property
    def drawn(self) -> bool:
        """Whether the target is drawn for each step."""
        return self.kind in ("random", "random-log")


def hold(sparsity: float, share: float = 1.0) -> Phase:
    """Hold realised sparsity at one target."""
    return Phase("sparsity", sparsity, sparsity, share)


def ramp(first: float, last: float, share: float = 1.0) -> Phase:
    """Move the target of realised sparsity in a straight line."""
    return Phase("sparsity", first, last, share)


def draw(low: float, high: float, share: float = 1.0, log: bool = False) -> Phase:
    """Draw a target of realised sparsity for each step, with ``log`` more of the high ones; see :class:`Phase`."""
    return Phase("random-log" if log else "random", low, high, share)


def fixed_tau(tau: float, share: float = 1.0) -> Phase:
    """Leave tau where it is, whatever sparsity comes of it."""
    return Phase("tau", tau, tau, share)


def all_experts(share: float = 1.0) -> Phase:
    """Every expert active."""
    return fixed_tau(1.0, share)


@dataclass(frozen=True)
class Aim:
    """What one step is run at: a tau as it is, or a sparsity for the controller to reach."""

    tau: float | None = None
    sparsity: float | None = None


def aim_at(phases: Sequence[Phase], step: int, steps: int, seed: int, batch: int = 0, batches: int = 1) -> Aim:
    """The aim of step ``step`` (from 0) of ``steps``, for batch ``batch`` (from 0) of the ``batches`` that it adds up.

    Targets that are drawn are drawn for each batch, each from its own part of the range, lowest first.
    """
    total = sum(phase.share for phase in phases)
    begin = 0.0
    for number, phase in enumerate(phases):
        end = begin + phase.share * steps / total
        if step < round(end) or number == len(phases) - 1:
            break
        begin = end
    start, stop = round(begin), round(end)
    along = (step - start) / max(1, stop - 1 - start)
    if phase.drawn:
        text = f"sparsity {seed} {step}" if batch == 0 else f"sparsity {seed} {step} {batch}"
        along = (batch + random.Random(seed_of(text)).random()) / batches
    along = min(1.0, along)
    if phase.kind == "random-log":
        return Aim(sparsity=1.0 - (1.0 - phase.first) ** (1.0 - along) * (1.0 - phase.last) ** along)
    value = phase.first + along * (phase.last - phase.first)
    return Aim(tau=value) if phase.kind == "tau" else Aim(sparsity=value)


def seed_of(text: str) -> int:
    """A seed of 63 bits from a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
