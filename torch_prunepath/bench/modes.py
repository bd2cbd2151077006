"""One side of ``prunepath bench decode``, dense or sparse: its steps made fast in several modes, checked and timed.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from torch_prunepath.bench.check import relative_rms, require
from torch_prunepath.bench.decoder import Step, Work, logits_of
from torch_prunepath.bench.options import MODES, DecodeOptions
from torch_prunepath.bench.timing import Peak, Timing, peak_memory, timed

CHECKED_CALLS = 4
"""Calls whose logits are compared: the first ones, as each takes an eager call too."""


@dataclass(frozen=True)
class Measured:
    """One side's times by mode, and its peak memory."""

    times: dict[str, Timing]
    peak: Peak

    @property
    def best(self) -> str:
        """The fastest mode."""
        return min(self.times, key=lambda mode: self.times[mode].median_us)

    @property
    def timing(self) -> Timing:
        """The times of the fastest mode."""
        return self.times[self.best]


def ready_steps(work: Work, modes: Sequence[str], backend: str, what: str) -> dict[str, Step]:
    """The work's step in each mode; ``what`` names it in the progress bar."""
    bar = tqdm(modes, desc=f"compiling {what}", unit="mode", disable=None, leave=False)
    return {mode: work.prepared(MODES[mode], backend) for mode in bar}


def time_steps(work: Work, steps: Mapping[str, Step], options: DecodeOptions) -> Measured:
    """Time the steps by turns."""

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
    """The largest error over the modes.

    Args:
        work: what the steps belong to.
        steps: by mode.
        expected_RV: logits of the first ``CHECKED_CALLS`` calls.
        bound: largest relative RMS error.
        what: names the side in the message.

    Raises:
        WrongResult: if an error is above the bound.
    """
    return max(
        require(relative_rms(logits_of(work, step, CHECKED_CALLS), expected_RV), bound, f"{what}, mode {mode},")
        for mode, step in steps.items()
    )


def describe(work: Work) -> str:
    """The work in words."""
    return f"decoding at batch {work.batch}" if work.phase == "decode" else f"a prompt of {work.tokens} tokens"
