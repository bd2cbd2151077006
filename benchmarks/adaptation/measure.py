"""Perplexity at a realised sparsity: what each kind of method turns to get there, and what it found.

Shapes: N windows of C tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.baselines import Thresholding
from torch_prunepath.inputs.data import evaluation_mode
from torch_prunepath.sparsity import record_sparsity, set_tau
from torch_prunepath.train.controller import LOGIT_RANGE, logit, sigmoid

TOLERANCE = 0.002
PASSES = 24


class Unreachable(ValueError):
    """No setting gives the sparsity asked for."""


class Record(Protocol):
    """What counted while the model ran."""

    @property
    def sparsity(self) -> float:
        """Realised."""


class Knob(Protocol):
    """What makes a trained model sparse."""

    def set(self, share: float, search_NC: Tensor) -> float | None:
        """Make this share inactive on these windows; the tau that does, if there is one.

        Raises:
            Unreachable: if nothing does.
        """

    def recording(self) -> contextlib.AbstractContextManager[Record]:
        """Counts realised sparsity inside the context."""


class Constant:
    """A model whose sparsity is what it is: dense, or pruned."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def set(self, share: float, search_NC: Tensor) -> None:
        return None

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        yield self


class TauKnob:
    """Routed models: tau is searched. What was seen at one target narrows the search for the next.

    Args:
        model: a sparse model.
        rows: windows that go through it at once.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.rows = model, rows
        self._seen: dict[int, list[tuple[float, float]]] = {}

    def set(self, share: float, search_NC: Tensor) -> float:
        # logit(tau) falls as sparsity rises, close to a straight line in logit(sparsity).
        seen = self._seen.setdefault(id(search_NC), [(LOGIT_RANGE[1], 0.0)])
        guess = LOGIT_RANGE[0]
        if len(seen) == 1:
            self._see(seen, guess, search_NC)
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
            self._see(seen, _between(above, below, share, halve=count % 3 == 2), search_NC)
        best = min(seen, key=lambda point: abs(point[1] - share))
        set_tau(self.model, sigmoid(best[0]))
        return sigmoid(best[0])

    def _see(self, seen: list[tuple[float, float]], u: float, search_NC: Tensor) -> None:
        set_tau(self.model, sigmoid(u))
        with self.recording() as record:
            run(self.model, search_NC, self.rows)
        seen.append((u, record.sparsity))

    def recording(self) -> contextlib.AbstractContextManager[Record]:
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

    def set(self, share: float, search_NC: Tensor) -> float:
        set_tau(self.model, 1.0 - share)
        return 1.0 - share


class ThresholdKnob:
    """Thresholds on activations, set on calibration data."""

    def __init__(self, handle: Thresholding) -> None:
        self.handle = handle

    def set(self, share: float, search_NC: Tensor) -> None:
        self.handle.set_sparsity(share)

    def recording(self) -> contextlib.AbstractContextManager[Record]:
        return self.handle.record()


def run(model: Any, window_NC: Tensor, rows: int) -> float:
    """Mean negative log-likelihood of tokens 2 to C of every window.

    Args:
        model: a causal language model, run in evaluation mode.
        window_NC: int64.
        rows: windows at once.
    """
    device = model.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluation_mode(model), torch.inference_mode():
        for part_BC in window_NC.split(rows):
            part_BC = part_BC.to(device)
            logits_TV = model(input_ids=part_BC, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += nnf.cross_entropy(logits_TV.float(), part_BC[:, 1:].flatten(), reduction="sum")
    return float(total) / (window_NC.shape[0] * (window_NC.shape[1] - 1))


def perplexity_row(model: Any, knob: Knob, window_NC: Tensor, rows: int) -> dict[str, float]:
    """Realised sparsity and perplexity on a text, as the knob stands.

    Raises:
        FloatingPointError: if the perplexity is not finite.
    """
    with knob.recording() as record:
        mean = run(model, window_NC, rows)
    if not math.isfinite(mean):
        raise FloatingPointError("the trained model's logits contain NaN or infinity: lower the learning rate")
    return {"sparsity": record.sparsity, "perplexity": math.exp(min(mean, 100.0))}
