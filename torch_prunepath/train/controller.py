"""Holding realised sparsity at a target while the model changes, by choosing tau.

logit(tau) is close to a straight line in logit(sparsity). The controller keeps the latest observations of both and, for
a target, evaluates the line through them, those near the target and the latest ones weighing most: for one target that
is an integral controller, and for many targets at once each serves the others. An observation belongs to the tau that
it was made with, so that it may come a step late without making the loop unstable.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from torch_prunepath.search import SLOPES, logit, logit_of_share, sigmoid

logger = logging.getLogger(__name__)

LOGIT_RANGE = (-60.0, 16.0)
"""Range of logit(tau): layers with small budgets need a tau many orders of magnitude below 1."""

MEMORY = 64
"""How many observations are kept: at the default rate those that are older weigh nothing."""

NEAR = 1.5
"""Distance in logit(sparsity) beyond which an observation weighs little: from 0.5 to 0.8 it is 1.4."""

PRIOR = 0.01
"""Variance of logit(sparsity) from which on observations decide the slope, which is -1 before: batches alone vary it
by less."""


class SparsityController:
    """Chooses tau for a target sparsity, from the sparsities that earlier choices gave.

    Args:
        rate: in (0, 1): how much less each observation weighs than the one after it; smaller is smoother where batches
            differ, larger follows a changing model faster.

    Example::

        tau = controller.tau_for(0.7)
        ...  # run a step with it
        controller.observe(tau, realised)
    """

    def __init__(self, rate: float = 0.3) -> None:
        if not 0.0 < rate < 1.0:
            raise ValueError(f"rate={rate} is outside (0, 1): 0.3 suits batches of thousands of tokens")
        self.rate = rate
        self._seen: list[tuple[float, float]] = []  # logit(sparsity), logit(tau); the latest last
        self._warned = False

    def tau_for(self, sparsity: float) -> float:
        """The tau expected to give this sparsity; exactly 1 for sparsity 0."""
        if sparsity == 0.0:
            return 1.0
        target = logit_of_share(sparsity)
        # At first: a router that spreads its mass evenly, sparsity = 1 - tau.
        u = self._line(target) if self._seen else -target
        return sigmoid(min(max(u, LOGIT_RANGE[0]), LOGIT_RANGE[1]))

    def _line(self, target: float) -> float:
        v, u = np.array(self._seen).T
        age = np.arange(len(v))[::-1]
        log_weight = age * math.log1p(-self.rate) - 0.5 * ((v - target) / NEAR) ** 2
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        mean_v, mean_u = weight @ v, weight @ u
        covariance = weight @ ((v - mean_v) * (u - mean_u))
        variance = weight @ (v - mean_v) ** 2
        slope = np.clip((covariance - PRIOR) / (variance + PRIOR), *SLOPES)
        return float(mean_u + slope * (target - mean_v))

    def observe(self, tau: float, sparsity: float) -> None:
        """Learn that a step run at ``tau`` realised ``sparsity``. tau = 1 teaches nothing."""
        if not 0.0 < tau < 1.0:
            return
        u = logit(tau)
        self._seen = [*self._seen, (logit_of_share(sparsity), u)][-MEMORY:]
        if u <= LOGIT_RANGE[0] + 1e-3 and not self._warned:
            self._warned = True
            logger.warning(
                "the target sparsity is out of reach: %.3f is realised with one expert a layer; ask for less, or build "
                "the model with a smaller expert_size",
                sparsity,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything learnt, as plain values."""
        return {"rate": self.rate, "seen": [list(pair) for pair in self._seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.rate = state["rate"]
        self._seen = [(float(v), float(u)) for v, u in state["seen"]]
