"""The sparsity of each step of a training run: phases, and a pure function from phases, seed and step to an aim."""

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
            ``first`` to ``last``; ``"random"``: the target is drawn anew for each step, uniform between ``first`` and
            ``last``, so that one checkpoint serves all of them (in a single process it is drawn for each batch: the
            batches that a step adds up divide the range among them); ``"random-log"``: the target is drawn as for
            ``"random"``, but uniform in the logarithm of the share of neurons that are active, so that each halving of
            that share gets as many steps; ``"tau"``: tau itself goes from ``first`` to ``last``, and sparsity is not
            controlled.
        first: sparsity in [0, 1), or tau in (0, 1], at the start.
        last: sparsity or tau at the end, in the same range.
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
            raise ValueError(
                f"a target cannot be drawn from {self.first} to {self.last}: give the lower sparsity first, "
                f"draw from {self.last} to {self.first}"
            )
        if not self.share > 0.0:
            raise ValueError(f"share={self.share} must be positive: leave the phase out if it has no steps")

    @property
    def drawn(self) -> bool:
        """Whether the target is drawn for each step."""
        return self.kind in ("random", "random-log")


def hold(sparsity: float, share: float = 1.0) -> Phase:
    """Return a phase that holds realised sparsity at one target."""
    return Phase("sparsity", sparsity, sparsity, share)


def ramp(first: float, last: float, share: float = 1.0) -> Phase:
    """Return a phase in which the target of realised sparsity moves in a straight line."""
    return Phase("sparsity", first, last, share)


def draw(low: float, high: float, share: float = 1.0, log: bool = False) -> Phase:
    """Return a phase that draws a target sparsity for each step, with ``log`` more of the high ones."""
    return Phase("random-log" if log else "random", low, high, share)


def fixed_tau(tau: float, share: float = 1.0) -> Phase:
    """Return a phase with one tau, whatever sparsity comes of it."""
    return Phase("tau", tau, tau, share)


def all_experts(share: float = 1.0) -> Phase:
    """Return a phase in which every expert is active."""
    return fixed_tau(1.0, share)


@dataclass(frozen=True)
class Aim:
    """The goal of one step: either a tau, or a sparsity that the controller is to reach."""

    tau: float | None = None
    sparsity: float | None = None


def aim_at(phases: Sequence[Phase], step: int, steps: int, seed: int, batch: int = 0, batches: int = 1) -> Aim:
    """Return the aim of step ``step`` of ``steps``, for batch ``batch`` of the ``batches`` that it adds up.

    ``step`` and ``batch`` count from 0. A target that is drawn is drawn for each batch, from the batch's own part of
    the range; the first batch has the lowest part.
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
    """Derive a seed of 63 bits from a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
