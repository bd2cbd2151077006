"""How one layer is best read in part: a tau and two thresholds for every share of its bytes, and what each costs.

A layer's three sparsities are lowered one step at a time, always the one that saves most bytes for what it costs. The
cost is that of :mod:`torch_prunepath.experts.budget`: the second-order estimate of the loss, from what is then missing
in the layer's output and the Fisher information there. TEAL (arXiv 2408.14690) walks likewise, over projections in
place of sparsities.

Shapes: N tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.norms import column_norms, row_norms
from torch_prunepath.ops.experts import expand_experts, weigh
from torch_prunepath.quantiles import Quantiles
from torch_prunepath.select import mask_from_scores, sigmoid_weights

GIVEN_UP = (0.0, 0.003, 0.01, 0.025, 0.05, 0.1, 0.2, 0.32, 0.45, 0.6, 0.75, 0.88)
"""Steps of tau: shares of the mass that it may reach at most which are given up. A guess."""

INPUTS_OFF = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Steps of the threshold on inputs: shares of inputs that are left out. A guess."""

NEURONS_OFF = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93)
"""Steps of the threshold on neurons: shares of active experts' neurons that are left out. A guess."""

Steps = tuple[int, int, int]
"""Places in ``GIVEN_UP``, ``INPUTS_OFF`` and ``NEURONS_OFF``."""


class Setting(NamedTuple):
    """What may be set on a layer at any time: its tau, and its thresholds on inputs and on neurons."""

    tau: float
    theta_x: float
    theta_h: float


NumbersT = TypeVar("NumbersT", bound=tuple[float, ...])


def towards(here: NumbersT, there: NumbersT, share: float) -> NumbersT:
    """The named numbers that are this share, in [0, 1], of the way from ``here`` to ``there``; exactly those at 1."""
    if share == 1.0:
        return there
    return type(here)(*(a + share * (b - a) for a, b in zip(here, there, strict=True)))  # type: ignore[arg-type]


class Point(NamedTuple):
    """One setting of a layer on its path.

    Attributes:
        bytes: share of the FFN's bytes that a token reads on average, router included.
        cost: estimated loss, in nats.
        setting: the setting.
    """

    bytes: float
    cost: float
    setting: Setting


class LayerCosts:
    """What the settings of one layer save and cost, measured on its inputs.

    Args:
        view: the FFN, neurons in expert order.
        layer: its sparse layer.
        x_ND: inputs of the dense FFN.
        fisher_DD: the layer's result of :func:`torch_prunepath.experts.budget.fisher_information`.
        start_tau: tau with which nothing counts as lost.
    """

    def __init__(
        self, view: FFNView, layer: RoutedExperts, x_ND: Tensor, fisher_DD: Tensor, start_tau: float = 1.0
    ) -> None:
        self._view, self._layer, self._start = view, layer, start_tau
        self._x_ND, self._fisher_DD = x_ND.float(), fisher_DD.float()
        first = [weight for weight in (view.up_FD, view.gate_FD) if weight is not None]
        self._down_FD = view.down_FD.float()
        self._column_norm_D, self._row_norm_F = column_norms(*first), row_norms(view.down_FD)
        self._scores_NE = layer.router(x_ND).float()
        self._weights_NE = None
        if layer.experts.gate == "sigmoid":
            self._weights_NE = sigmoid_weights(self._scores_NE, layer.experts.gate_offset, layer.experts.shared)
        self._up_share = len(first) / (len(first) + 1)
        self._router_share = layer.router.weight.numel() / ((len(first) + 1) * view.down_FD.numel())
        self._input_sizes = Quantiles(self._x_ND * self._column_norm_D)
        self._hidden: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._masks: dict[int, Tensor] = {}
        self._tables: dict[tuple[int, int], Quantiles] = {}
        self._whole_ND = self._output(self._at(0)[0], self._mask_NF(0))

    def point(self, steps: Steps) -> Point:
        """What a setting saves and costs."""
        tau_step, x_step, _ = steps
        (h_NF, sizes_NF, inputs_N), mask_NF = self._at(x_step), self._mask_NF(tau_step)
        theta_h = self._theta_h(steps, sizes_NF, mask_NF)
        kept_NF = mask_NF & ~(sizes_NF < theta_h)
        delta_ND = self._output(h_NF, kept_NF) - self._whole_ND
        cost_N = 0.5 * ((delta_ND @ self._fisher_DD) * delta_ND).sum(-1).clamp_min(0)
        up = float((mask_NF.float().mean(-1) * inputs_N).mean()) * self._up_share
        down = float(kept_NF.float().mean()) * (1 - self._up_share)
        # As for budgets, the square roots are averaged: a few tokens with huge activations would decide otherwise.
        cost = float(cost_N.sqrt().mean().square())
        return Point(up + down + self._router_share, cost, Setting(self._tau(tau_step), self._theta_x(x_step), theta_h))

    def _tau(self, step: int) -> float:
        return self._start - GIVEN_UP[step] * self._start

    def _theta_x(self, step: int) -> float:
        return self._input_sizes.threshold(INPUTS_OFF[step])

    def _theta_h(self, steps: Steps, sizes_NF: Tensor, mask_NF: Tensor) -> float:
        tau_step, x_step, h_step = steps
        if h_step == 0:
            return 0.0
        if (tau_step, x_step) not in self._tables:
            self._tables[tau_step, x_step] = Quantiles(sizes_NF[mask_NF])
        return self._tables[tau_step, x_step].threshold(NEURONS_OFF[h_step])

    def _at(self, x_step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden activations ``[N, F]`` from the inputs that count, their sizes, and the share of inputs, ``[N]``."""
        if x_step not in self._hidden:
            counts_ND = ~(self._x_ND.abs() * self._column_norm_D < self._theta_x(x_step))
            h_NF = self._view.hidden(self._x_ND.masked_fill(~counts_ND, 0))
            self._hidden[x_step] = h_NF, h_NF.abs() * self._row_norm_F, counts_ND.float().mean(-1)
            _forget_passed(self._hidden, x_step)
        return self._hidden[x_step]

    def _mask_NF(self, tau_step: int) -> Tensor:
        if tau_step not in self._masks:
            experts, tau = self._layer.experts, torch.tensor(self._tau(tau_step), device=self._scores_NE.device)
            mask_NE = mask_from_scores(self._scores_NE, tau, experts.rule, experts.shared)
            self._masks[tau_step] = expand_experts(mask_NE, experts.expert_size, self._layer.ffn.ffn_size)
            _forget_passed(self._masks, tau_step)
        return self._masks[tau_step]

    def _output(self, h_NF: Tensor, kept_NF: Tensor) -> Tensor:
        h_NF = weigh(h_NF.masked_fill(~kept_NF, 0), self._weights_NE, self._layer.experts.expert_size)
        return h_NF @ self._down_FD


def _forget_passed(steps: dict[int, Any], here: int) -> None:
    """Drop what belongs to steps that a walk has passed: it needs the last one and the next."""
    for passed in [step for step in steps if step < here - 1]:
        del steps[passed]


@torch.no_grad()
def layer_path(costs: LayerCosts) -> list[Point]:
    """Walk from the whole layer to the least of it; of the settings passed, those that are best at some price of bytes.

    Returns:
        Points in the order of falling bytes and rising cost, the latter ever more steeply.
    """
    ends = [len(steps) - 1 for steps in (GIVEN_UP, INPUTS_OFF, NEURONS_OFF)]
    here: Steps = (0, 0, 0)
    points = [costs.point(here)]
    while True:
        ways = [_moved(here, knob) for knob, end in enumerate(ends) if here[knob] < end]
        if not ways:
            return convex(points)
        tried = [(costs.point(steps), steps) for steps in ways]
        point, here = min(tried, key=lambda pair: _price(points[-1], pair[0]))
        points.append(point)


def _moved(steps: Steps, knob: int) -> Steps:
    """One step further with one of the three sparsities."""
    tau, x, h = (step + (i == knob) for i, step in enumerate(steps))
    return tau, x, h


def _price(before: Point, after: Point) -> float:
    """What a byte costs that is saved by going from one setting to another.

    A step that saves nothing is taken at once if it costs nothing either: what follows it may save.
    """
    saved, cost = before.bytes - after.bytes, after.cost - before.cost
    return cost / saved if saved > 0 else -math.inf if cost <= 0 else math.inf


def convex(points: list[Point]) -> list[Point]:
    """Those of the points that cost least at some price of a byte, in the order of falling bytes."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.bytes, p.cost)):
        if hull and point.bytes == hull[-1].bytes:
            continue
        while hull and point.cost <= hull[-1].cost:
            hull.pop()
        while len(hull) >= 2 and _price(hull[-2], hull[-1]) >= _price(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


# --- all layers together ----------------------------------------------------------------------------------------------


def shared_out(paths: Mapping[str, Sequence[Point]], sizes: Mapping[str, float], target: float) -> dict[str, Setting]:
    """Set every layer so that all of them read a share of their bytes, and the last byte saved costs the same in each.

    Args:
        paths: the path of each layer, by name.
        sizes: bytes of each layer's FFN.
        target: share of all layers' bytes, router included.

    Raises:
        ValueError: if even the ends of all paths read more.
    """
    total = sum(sizes.values())

    def at(price: float) -> dict[str, int]:
        return {name: _place(path, price) for name, path in paths.items()}

    def read(places: Mapping[str, int]) -> float:
        return sum(paths[name][place].bytes * sizes[name] for name, place in places.items()) / total

    prices = sorted({_price(a, b) for path in paths.values() for a, b in itertools.pairwise(path)})
    least = read({name: len(path) - 1 for name, path in paths.items()})
    if target < least:
        raise ValueError(f"{target:.3g} of the bytes is out of reach: {least:.3g} is the least that layers can read")
    if not prices:
        return {name: path[0].setting for name, path in paths.items()}
    # The prices of two neighbouring states, of which one reads more than the target and the other one less.
    low, high = 0, len(prices)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if read(at(prices[middle])) > target else (low, middle)
    less, more = at(prices[low]), at(prices[low - 1]) if low else dict.fromkeys(paths, 0)
    above, below = read(more), read(less)
    share = 0.0 if above <= below else min(1.0, max(0.0, (above - target) / (above - below)))
    return {name: towards(path[more[name]].setting, path[less[name]].setting, share) for name, path in paths.items()}


def _place(path: Sequence[Point], price: float) -> int:
    """How far a convex path is walked when a byte is worth this much."""
    steps = [_price(a, b) for a, b in itertools.pairwise(path)]
    return bisect.bisect_right(steps, price)
