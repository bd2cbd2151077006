"""Holding realised sparsity at a target while the model changes: an online estimate of the curve from tau to sparsity.

The curve is kept as logit(sparsity) over a grid of logit(tau), where it is close to a straight line. Each observation
moves it near where it was made (the first ones move all of it), by a share of the error: an integral controller for
every target at once. An observation belongs to the tau that it was made with, so that it may come a step late without
making the loop unstable.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

LOGIT_RANGE = (-60.0, 16.0)
SPACING = 0.5
WIDTH = 1.0
"""How far an observation reaches, in logit(tau)."""
FIRST_WIDTH = 16.0
CLOSEST = 1e-4
"""Sparsities nearer to 0 or 1 than this are taken for this near."""


def logit(p: float) -> float:
    """``log(p / (1 - p))``."""
    return math.log(p) - math.log1p(-p)


def sigmoid(u: float) -> float:
    """The inverse of :func:`logit`."""
    return 1 / (1 + math.exp(-u)) if u >= 0 else math.exp(u) / (1 + math.exp(u))


class SparsityController:
    """Chooses tau for a target sparsity, from the sparsities that earlier choices gave.

    Args:
        rate: share of an observed error that is corrected at once, in (0, 1]; smaller is smoother where batches differ.

    Example::

        tau = controller.tau_for(0.7)
        ...  # run a step with it
        controller.observe(tau, realised)
    """

    def __init__(self, rate: float = 0.5) -> None:
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate={rate} is outside (0, 1]: 1 corrects all of an error at once")
        self.rate = rate
        self._knots = np.arange(LOGIT_RANGE[0], LOGIT_RANGE[1] + SPACING, SPACING)
        # A router that spreads its mass evenly: sparsity = 1 - tau.
        self._values = -self._knots
        self._count = 0
        self._warned = False

    def tau_for(self, sparsity: float) -> float:
        """The tau expected to give this sparsity; exactly 1 for sparsity 0."""
        if sparsity == 0.0:
            return 1.0
        target = logit(min(max(sparsity, CLOSEST), 1 - CLOSEST))
        return sigmoid(float(np.interp(target, self._values[::-1], self._knots[::-1])))

    def observe(self, tau: float, sparsity: float) -> None:
        """Learn that a step run at ``tau`` realised ``sparsity``. tau = 1 teaches nothing."""
        u = logit(tau) if 0.0 < tau < 1.0 else math.inf
        if not self._knots[0] <= u <= self._knots[-1]:
            return
        found = logit(min(max(sparsity, CLOSEST), 1 - CLOSEST))
        estimate = float(np.interp(u, self._knots, self._values))
        width = max(WIDTH, FIRST_WIDTH / (1 + self._count))
        rate = max(self.rate, 1 / (1 + self._count))
        reach = np.exp(-0.5 * ((self._knots - u) / width) ** 2)
        self._values = self._values + rate * (found - estimate) * reach
        self._count += 1
        self._straighten(u)
        self._warn(u, sparsity)

    def _straighten(self, u: float) -> None:
        """More tau never means more sparsity: bend what contradicts the neighbourhood of the latest observation."""
        split = int(np.searchsorted(self._knots, u))
        right, left = self._values[split:], self._values[:split]
        here = float(np.interp(u, self._knots, self._values))
        self._values = np.concatenate(
            [np.maximum.accumulate(np.maximum(left, here)[::-1])[::-1], np.minimum.accumulate(np.minimum(right, here))]
        )

    def _warn(self, u: float, sparsity: float) -> None:
        if u <= self._knots[0] and not self._warned:
            self._warned = True
            logger.warning(
                "the target sparsity is out of reach: %.3f is realised with one expert a layer; ask for less, or build "
                "the model with a smaller expert_size",
                sparsity,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything learnt, as plain values."""
        return {"rate": self.rate, "values": self._values.tolist(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: if the state is of another grid.
        """
        if len(state["values"]) != len(self._knots):
            raise ValueError("the controller's state is of another version: start training anew")
        self.rate, self._count = state["rate"], state["count"]
        self._values = np.array(state["values"])
