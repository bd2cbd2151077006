"""What the harness asks of a task, and what a method gives back for it to be measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from torch_prunepath.sparsity import set_tau

Row = dict[str, Any]
"""One measurement, ready for JSON. ``asked``: the sparsity; ``tau``: what was set; the rest is the task's."""


class Unreachable(ValueError):
    """No setting of the model gives the sparsity that was asked for."""


class Record(Protocol):
    """What counted while the model ran."""

    @property
    def sparsity(self) -> float:
        """Share of what was left out, averaged over tokens, then over layers."""


class Knob(Protocol):
    """What brings a trained model to a sparsity."""

    def set(self, share: float, batches: Sequence[Mapping[str, Any]]) -> float | None:
        """Make this share inactive on these batches.

        Args:
            share: in [0, 1).
            batches: model inputs on the model's device; the same list again narrows the search.

        Returns:
            The tau that does it, if there is one.

        Raises:
            Unreachable: if nothing does it.
        """

    def recording(self, front_tokens: int = 0) -> contextlib.AbstractContextManager[Record]:
        """A context in which realised sparsity is counted."""


@dataclass
class Trained:
    """A trained model.

    Attributes:
        model: on its device.
        knob: makes it sparse.
        taus: further settings to measure, such as the one that a method's authors publish, by name.
    """

    model: Any
    knob: Knob
    taus: Mapping[str, float] = field(default_factory=dict)

    def settings(self, sparsity: Sequence[float], batches: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        """Bring the model to each of its own settings and to each sparsity, and say what was set.

        A sparsity that is out of reach has ``unreachable``, the reason, in place of ``tau``: do not measure it.
        """
        for name, tau in self.taus.items():
            set_tau(self.model, tau)
            yield {"asked": None, "setting": name, "tau": tau}
        for share in sparsity:
            try:
                yield {"asked": share, "tau": self.knob.set(share, batches)}
            except Unreachable as error:
                yield {"asked": share, "unreachable": str(error)}


class Task(Protocol):
    """Data, a model for them, and how well a model does on them.

    Attributes:
        name: for files and tables.
        model: what results call the model.
        weights: digest of the model's files.
        about: all else that decides what a job gives, ready for JSON: digests of the data, sizes of batches, and so on.
        tuned: whether methods begin with the dense model fine-tuned on the task, since the pretrained one has a new
            head; otherwise they begin with the pretrained one.
        causal: whether the model is a causal language model, which some methods need.
        accumulation: batches a step, unless a method's settings say otherwise.
        step_tokens: tokens that a step trains on; None where steps differ.
        calibration_tokens: tokens that experts, routers and scores are made from, at most.
        packages: whose versions matter besides the usual ones, where they are installed.
    """

    name: str
    model: str
    weights: str
    about: Mapping[str, Any]
    tuned: bool
    causal: bool
    accumulation: int
    step_tokens: int | None
    calibration_tokens: int
    packages: tuple[str, ...]

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model in float32 on its device, in evaluation mode; a new head is drawn from the seed."""

    def batches(self, seed: int, *, one_shape: bool = False, accumulation: int = 1, skip: int = 0) -> Any:
        """Training batches, sized, which can be iterated again and again.

        Args:
            seed: decides their order.
            one_shape: make every batch the same shape, for compiled training.
            accumulation: batches that a step takes.
            skip: batches that an earlier stage took; a task whose passes differ may leave it unused.
        """

    def calibration(self) -> Any:
        """What conversions take as calibration: token ids ``[N, C]``, or batches without labels."""

    def evaluate(self, trained: Trained, sparsity: Sequence[float]) -> list[Row]:
        """A row for each setting of :meth:`Trained.settings`, and for each text if there are several.

        A task that is ``tuned`` has two halves in each row, ``select`` and ``report``; ``select["score"]``, larger is
        better, is what choices are made by.
        """
