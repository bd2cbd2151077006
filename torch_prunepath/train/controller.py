"""Holding realised sparsity at a target while the model changes, by choosing tau.

As a function of logit(sparsity), logit(tau) is close to a straight line. The controller keeps the latest observations
of both, fits a line through them, and reads tau off it at the target. Observations that are recent or near the target
weigh most. With one target this is an integral controller; with many targets, observations of one help to reach the
others. Each observation is stored with the tau that gave it, so it may come a step late without making the control
unstable.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from torch_prunepath.search import SLOPES, logit, logit_of_share, sigmoid

logger = logging.getLogger(__name__)

LOGIT_RANGE = (-60.0, 16.0)
"""Range of logit(tau). It reaches far down because layers with small budgets need a tau many orders of magnitude below
1. Both ends are guesses."""

MEMORY = 64
"""Number of observations that are kept. At the default rate of 0.3, the next older one would weigh 0.7^64, or 1e-10."""

NEAR = 1.5
"""Standard deviation, in logit(sparsity), of the weight that falls with an observation's distance from the target. The
distance from 0.5 to 0.8 is 1.4. A guess."""

PRIOR = 0.01
"""Variance of logit(sparsity) above which the observations decide the slope of the line more than the value assumed at
the start, -1. It is meant to lie above the variance that different batches cause; a guess."""


class SparsityController:
    """A controller that chooses tau for a target sparsity from the sparsities that earlier choices gave.

    Args:
        rate: how much less each observation weighs than the one after it, in (0, 1). A smaller rate is smoother where
            batches differ; a larger one follows a changing model faster.

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
        """Return the tau that is expected to give this sparsity; exactly 1 for sparsity 0."""
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
        """Learn that a step run at ``tau`` realised ``sparsity``. An observation at tau = 1 is ignored."""
        if not 0.0 < tau < 1.0:
            return
        u = logit(tau)
        self._seen = [*self._seen, (logit_of_share(sparsity), u)][-MEMORY:]
        if u <= LOGIT_RANGE[0] + 1e-3 and not self._warned:
            self._warned = True
            logger.warning(
                "the target sparsity is out of reach: with one expert active in each layer it is %.3f; ask for less, "
                "or build the model with a smaller expert_size",
                sparsity,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was learnt, as plain values."""
        return {"rate": self.rate, "seen": [list(pair) for pair in self._seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another controller's :meth:`state_dict` returned."""
        self.rate = state["rate"]
        self._seen = [(float(v), float(u)) for v, u in state["seen"]]
