"""How each kind of trained model is brought to a sparsity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness.task import Record, Unreachable
from torch_prunepath.baselines import Thresholding
from torch_prunepath.sparsity import measure_sparsity, record_sparsity, set_tau
from torch_prunepath.train.controller import LOGIT_RANGE, logit, sigmoid

TOLERANCE = 0.002
"""Distance from the sparsity asked for that is near enough: that of ``set_sparsity``."""
PASSES = 24
"""Trials of tau after which the nearest one is taken."""
Batches = Sequence[Mapping[str, Any]]


class Constant:
    """A model whose sparsity is what it is: dense, or pruned."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def set(self, share: float, batches: Batches) -> None:
        """Nothing can be set."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        """There is nothing to count."""
        yield self


class TauKnob:
    """Routed models: tau is searched. What was seen at one sparsity narrows the search for the next.

    Args:
        model: a sparse model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._seen: list[tuple[float, float]] = []
        self._batches: Batches | None = None

    def set(self, share: float, batches: Batches) -> float:
        """Search tau on these batches."""
        # logit(tau) falls as sparsity rises, close to a straight line in logit(sparsity).
        if batches is not self._batches:
            self._batches, self._seen = batches, [(LOGIT_RANGE[1], 0.0)]
        seen = self._seen
        if len(seen) == 1:
            self._see(LOGIT_RANGE[0])
        for count in range(PASSES):
            best = min(seen, key=lambda point: abs(point[1] - share))
            most = min(seen)
            if most[1] < share - TOLERANCE:
                raise Unreachable(f"one expert a layer is {most[1]:.3f} sparse already")
            if abs(best[1] - share) <= TOLERANCE:
                break
            above = max((p for p in seen if p[1] >= share), default=most)
            below = min(p for p in seen if p[1] < share)
            if below[0] - above[0] < 1e-3:
                break
            self._see(_between(above, below, share, halve=count % 3 == 2))
        best = min(seen, key=lambda point: abs(point[1] - share))
        set_tau(self.model, sigmoid(best[0]))
        return sigmoid(best[0])

    def _see(self, u: float) -> None:
        assert self._batches is not None
        set_tau(self.model, sigmoid(u))
        self._seen.append((u, measure_sparsity(self.model, [dict(batch) for batch in self._batches])))

    def recording(self) -> contextlib.AbstractContextManager[Record]:
        """Count inactive neurons."""
        return record_sparsity(self.model)


def _between(above: tuple[float, float], below: tuple[float, float], share: float, halve: bool) -> float:
    """logit(tau) between two points that enclose the share."""
    if halve:
        return (above[0] + below[0]) / 2
    ends = [logit(min(max(point[1], 1e-4), 1 - 1e-4)) for point in (above, below)]
    along = (logit(share) - ends[0]) / (ends[1] - ends[0]) if ends[0] != ends[1] else 0.5
    return above[0] + min(max(along, 0.05), 0.95) * (below[0] - above[0])


class ShareKnob(TauKnob):
    """Fixed top-k: tau is the share of active experts, whatever the text."""

    def set(self, share: float, batches: Batches) -> float:
        """No search."""
        set_tau(self.model, 1.0 - share)
        return 1.0 - share


class ThresholdKnob:
    """Thresholds on activations, set on calibration data."""

    def __init__(self, handle: Thresholding) -> None:
        self.handle = handle

    def set(self, share: float, batches: Batches) -> None:
        """Choose the thresholds that calibration gave for this share."""
        self.handle.set_sparsity(share)

    def recording(self) -> contextlib.AbstractContextManager[Record]:
        """Count what falls under the thresholds."""
        return self.handle.record()
