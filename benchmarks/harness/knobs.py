"""How each kind of trained model is brought to a sparsity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness.task import Record, Unreachable
from torch_prunepath.baselines import Thresholding
from torch_prunepath.search import OutOfReach, find_tau
from torch_prunepath.sparsity import measure_sparsity, record_sparsity, set_tau

Batches = Sequence[Mapping[str, Any]]


class Constant:
    """A model whose sparsity is what it is: dense, or pruned."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def set(self, share: float, batches: Batches) -> None:
        """Nothing can be set."""

    @contextlib.contextmanager
    def recording(self, front_tokens: int = 0) -> Iterator[Record]:
        """There is nothing to count."""
        yield self


class TauKnob:
    """Routed models: tau is searched. What was seen at one sparsity narrows the search for the next.

    Args:
        model: a sparse model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._seen: dict[float, float] = {}
        self._batches: Batches | None = None

    def set(self, share: float, batches: Batches) -> float:
        """Search tau on these batches."""
        if batches is not self._batches:
            self._batches, self._seen = batches, {}

        def measure(tau: float) -> float:
            set_tau(self.model, tau)
            return measure_sparsity(self.model, [dict(batch) for batch in batches])

        try:
            tau = find_tau(measure, share, seen=self._seen)
        except OutOfReach as error:
            raise Unreachable(f"one expert a layer is {error.most:.3f} sparse already") from error
        set_tau(self.model, tau)
        return tau

    def recording(self, front_tokens: int = 0) -> contextlib.AbstractContextManager[Record]:
        """Count inactive neurons, but not of the first ``front_tokens`` tokens of each row."""
        return record_sparsity(self.model, front_tokens=front_tokens)


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

    def recording(self, front_tokens: int = 0) -> contextlib.AbstractContextManager[Record]:
        """Count what falls under the thresholds, but not of the first ``front_tokens`` tokens of each row."""
        return self.handle.record(front_tokens=front_tokens)
