"""Which tau gives a sparsity: searched for where sparsity is measured, computed where router scores are known.

A search costs one measurement a step, and a measurement is a pass over the model. So the next setting is interpolated:
logit(sparsity) falls almost along a straight line as logit(tau) rises. What keeps a search short where that fails is a
budget: a guess may lie anywhere from which halving alone would still end within the measurements left.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torch_prunepath.config import Rule

TOLERANCE = 0.002
"""A realised sparsity this near to the target is the target: tables print sparsities in tenths of a per cent."""

RESOLUTION = 5e-8
"""Width of a bracket, as a logit, that is not divided further: neighbouring float32 numbers are 6e-8 apart or more."""

MEASUREMENTS = 37
"""Most measurements of one search: halving the range of tau's logits, 94, until it is ``RESOLUTION`` takes 31, and six
more may be spent on guesses."""

CLOSEST = 1e-4
"""Sparsities nearer to 0 or 1 than this are taken for this near, where a logit would be infinite."""

SLOPES = (-6.0, -0.15)
"""Limits of d logit(tau) / d logit(sparsity) between two measurements; outside, rounding or noise made the slope."""

MARGIN = 0.05
"""Share of a bracket by which a guess stays away from its ends, so that every measurement shortens it; and the
shortest step, as a logit, beyond the end of what was measured."""

TINY = 1e-12
"""How far below the target, as a logit, a sparsity is at least that falls short of it, however little."""

FEW = 3
"""After so many measurements that all fell short of the target, the sparsest setting is measured."""

LARGEST_TAU = 1.0 - 2.0**-24
"""Below 1, where every expert is active: the next smaller float32."""


class OutOfReach(ValueError):
    """No setting is sparse enough.

    Attributes:
        most: the largest sparsity that a setting gives.
    """

    def __init__(self, target: float, most: float) -> None:
        super().__init__(f"sparsity {target:g} is out of reach: the most that any setting gives is {most:.3f}")
        self.most = most


def logit(p: float) -> float:
    """``log(p / (1 - p))``."""
    return math.log(p) - math.log1p(-p)


def sigmoid(u: float) -> float:
    """The inverse of :func:`logit`."""
    return 1 / (1 + math.exp(-u)) if u >= 0 else math.exp(u) / (1 + math.exp(u))


def logit_of_share(share: float) -> float:
    """:func:`logit` of a share, which may be 0 or 1: see ``CLOSEST``."""
    return logit(min(max(share, CLOSEST), 1 - CLOSEST))


@dataclass(frozen=True)
class Knob:
    """A number that makes a model sparse, and the axis on which it is searched. Sparsity falls along the axis.

    Attributes:
        dense: the setting at which nothing is left out; never measured.
        sparsest: where the axis begins.
        densest: where the axis ends, next to ``dense``.
        setting: point of the axis -> setting.
        point: setting -> point of the axis.
    """

    dense: float
    sparsest: float
    densest: float
    setting: Callable[[float], float] = field(repr=False)
    point: Callable[[float], float] = field(repr=False)


TAU = Knob(dense=1.0, sparsest=-60.0, densest=34.0, setting=sigmoid, point=logit)
"""tau on the axis of its logit. -60 is near the smallest tau of a layer, 34 near the largest float64 below 1: layers
with large budgets need taus far below 1 to be sparse, those with small ones taus near 1 to be dense."""


class _Point(NamedTuple):
    """A measurement: where on the axis, and by how much its logit(sparsity) is above the target's."""

    u: float
    excess: float


def find_tau(
    measure: Callable[[float], float],
    target: float,
    *,
    tolerance: float = TOLERANCE,
    seen: MutableMapping[float, float] | None = None,
) -> float:
    """The tau whose measured sparsity is the target: :func:`find_setting` of ``TAU``."""
    return find_setting(TAU, measure, target, tolerance=tolerance, seen=seen)


def find_setting(
    knob: Knob,
    measure: Callable[[float], float],
    target: float,
    *,
    tolerance: float = TOLERANCE,
    seen: MutableMapping[float, float] | None = None,
) -> float:
    """The setting of a knob whose measured sparsity is nearest to the target, of those that a search looks at.

    Args:
        knob: what is searched.
        measure: setting -> sparsity; called at most ``MEASUREMENTS`` times. What it set last need not be the answer.
        target: sparsity in [0, 1).
        tolerance: the search ends as soon as a measured sparsity is this near. Where none can be, because sparsity
            jumps past the target, the nearest that was found is returned.
        seen: settings measured before, with their sparsities: they shorten the search. What is measured is added.

    Raises:
        OutOfReach: if even the sparsest setting is less sparse than the target, by more than the tolerance.

    Example::

        tau = find_tau(sparsity_at, target=0.8)
    """
    seen = {} if seen is None else seen
    sides: list[bool] = []  # of each measurement here: whether it was as sparse as the target, or sparser
    while True:
        known = {knob.dense: 0.0, **seen}
        best = min(known, key=lambda setting: abs(known[setting] - target))
        points = _points(knob, seen, target)
        low, high = _bracket(points)
        left, right = low.u if low else knob.sparsest, high.u if high else knob.densest
        if abs(known[best] - target) <= tolerance or right - left <= RESOLUTION or len(sides) == MEASUREMENTS:
            break
        if low is None and len(sides) >= FEW and not any(sides):
            u = knob.sparsest
        else:
            reach = RESOLUTION * 2.0 ** (MEASUREMENTS - len(sides) - 1)
            u = min(max(_guess(points, low, high, target, sides), left, right - reach), right, left + reach)
        setting = knob.setting(u)
        if setting in known:  # floats end here
            break
        seen[setting] = measure(setting)
        sides.append(seen[setting] >= target)
    if low is None and right - left <= RESOLUTION and known[best] < target - tolerance:
        raise OutOfReach(target, known[best])
    return best


def _points(knob: Knob, seen: Mapping[float, float], target: float) -> list[_Point]:
    aim = logit_of_share(target)
    # The side is decided by the sparsities themselves: near 0 and 1 their logits are clamped, and may be equal.
    excess = {k: logit_of_share(value) - aim for k, value in seen.items() if k != knob.dense}
    return sorted(_Point(knob.point(k), max(e, 0.0) if seen[k] >= target else min(e, -TINY)) for k, e in excess.items())


def _bracket(points: list[_Point]) -> tuple[_Point | None, _Point | None]:
    """The last point that is as sparse as the target, and the first after it that is not; None where there is none."""
    low = next((point for point in reversed(points) if point.excess >= 0), None)
    return low, next((point for point in points if point.excess < 0 and (low is None or point.u > low.u)), None)


def _guess(points: list[_Point], low: _Point | None, high: _Point | None, target: float, sides: list[bool]) -> float:
    """Where the target is, if logit(sparsity) is a straight line between the ends of the bracket, or beyond one end.

    Where the same end moved twice, the line is bent: the guess then goes twice as far from that end.
    """
    twice = len(sides) > 1 and sides[-1] == sides[-2]
    if low and high:
        along = low.excess / (low.excess - high.excess)
        if twice and sides[-1]:
            along = max(along, min(2 * along, 0.5))
        elif twice:
            along = min(along, max(2 * along - 1, 0.5))
        return low.u + min(max(along, MARGIN), 1 - MARGIN) * (high.u - low.u)
    near = low or high
    if near is None:
        return -logit_of_share(target)  # a router that spreads its mass evenly: sparsity = 1 - tau
    slope = -1.0
    if len(points) > 1:
        a, b = points[-2:] if low else points[:2]
        slope = min(max((b.u - a.u) / (b.excess - a.excess), SLOPES[0]), SLOPES[1]) if a.excess != b.excess else slope
    step = max(abs(slope * near.excess), MARGIN) * (2 if twice else 1)
    return near.u + step if low else near.u - step


@torch.no_grad()
def tau_of_scores(scores_TE: Tensor, sparsity: float, rule: Rule = "reach", shared: int = 0) -> float:
    """The tau at which the inactive share of all ``T * E`` (token, expert) pairs is nearest to ``sparsity``.

    Computed, not searched: for one layer, whose scores do not depend on tau.

    Args:
        scores_TE: router scores ``[T, E]``.
        sparsity: in [0, 1); 0 gives tau = 1.
        rule: the selection rule, ``"reach"`` or ``"below"``.
        shared: how many experts, the first ones, are always active.

    Returns:
        tau in (0, 1]; where sparsity is out of reach, one that leaves each token as few experts as can be.
    """
    tokens, experts = scores_TE.shape[0], scores_TE.shape[1] - shared
    active = round((1.0 - sparsity) * tokens * (experts + shared)) - tokens * shared
    wanted = max(tokens, active)
    if wanted >= tokens * experts:
        return 1.0
    ranked_TE = torch.softmax(scores_TE[:, shared:].float(), -1).sort(dim=-1, descending=True).values
    mass_TE = ranked_TE.cumsum(-1)
    shifted_TE = mass_TE.roll(1, -1) if rule == "reach" else mass_TE.clone()
    shifted_TE[:, 0] = 0.0
    low, high = shifted_TE.flatten().sort().values[wanted - 1 : wanted + 1]
    middle = (low + high) / 2
    # The middle of two neighbouring floats may round to the lower one, whose expert would then be inactive.
    return min(float(high if middle <= low else middle), LARGEST_TAU)
