"""One side of ``prunepath bench decode``, dense or sparse: its steps compiled in several modes, checked and timed.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_prunepath.bench.check import relative_rms, require
from torch_prunepath.bench.decoder import Step, Work, logits_of
from torch_prunepath.bench.options import MODES, DecodeOptions
from torch_prunepath.bench.timing import Peak, Timing, peak_memory, timed
from torch_prunepath.progress import progress_bar

CHECKED_CALLS = 4
"""Number of calls, the first ones, whose logits are compared. Each needs an eager call too; 4 is a guess."""


@dataclass(frozen=True)
class Measured:
    """The times of one side by mode, and its peak memory."""

    times: dict[str, Timing]
    peak: Peak

    @property
    def best(self) -> str:
        """Name of the fastest mode."""
        return min(self.times, key=lambda mode: self.times[mode].median_us)

    @property
    def timing(self) -> Timing:
        """Times of the fastest mode."""
        return self.times[self.best]


def ready_steps(work: Work, modes: Sequence[str], backend: str, what: str) -> dict[str, Step]:
    """Prepare the work's step in each mode; ``what`` names the step in the progress bar."""
    bar = progress_bar(modes, desc=f"compiling {what}", unit="mode", progress=None, leave=False)
    return {mode: work.prepared(MODES[mode], backend) for mode in bar}


def time_steps(work: Work, steps: Mapping[str, Step], options: DecodeOptions) -> Measured:
    """Time the steps in turn, and measure the peak memory of running each once."""

    def turn(step: Step) -> Callable[[], Any]:
        return lambda: work.turn(step)

    with peak_memory(options.torch_device) as peak:
        for step in steps.values():
            work.rewind()
            work.turn(step)
    times = timed(
        {mode: turn(step) for mode, step in steps.items()},
        options.torch_device,
        calls=work.calls,
        seconds=options.seconds,
        before=work.rewind,
    )
    return Measured(times, peak)


def check_steps(work: Work, steps: Mapping[str, Step], expected_RV: Tensor, bound: float, what: str) -> float:
    """Check the logits of each mode, and return the largest error over the modes.

    Args:
        work: the work that the steps belong to.
        steps: steps by mode.
        expected_RV: logits that the first ``CHECKED_CALLS`` calls should give.
        bound: largest relative RMS error allowed.
        what: name of the side, for the message.

    Raises:
        WrongResult: if an error is above the bound.
    """
    return max(
        require(relative_rms(logits_of(work, step, CHECKED_CALLS), expected_RV), bound, f"{what}, mode {mode},")
        for mode, step in steps.items()
    )


def describe(work: Work) -> str:
    """Describe the work in words."""
    return f"decoding at batch {work.batch}" if work.phase == "decode" else f"a prompt of {work.tokens} tokens"
