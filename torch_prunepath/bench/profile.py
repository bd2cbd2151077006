"""The option ``--profile``: where the time of one call goes, by kernel on CUDA and by operator on CPU.

A CUDA graph is replayed as when it is timed, and the profiler sees the kernels inside. Kernels that overlap are listed
with their full times, so their sum may exceed the time of the call. Later calls may be slower: before CUDA 12.6 the
profiler leaves its callbacks in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType

from torch_prunepath.bench.decoder import Step, Work
from torch_prunepath.bench.options import DecodeOptions
from torch_prunepath.console.errors import UserError, write_error
from torch_prunepath.console.report import aligned

LONGEST_NAME = 100
"""Largest number of characters of a kernel's name that are shown: names of C++ templates hold all their arguments."""


@dataclass(frozen=True)
class Entry:
    """A kernel or operator: its name, how often a call starts it, and its own time in all, in microseconds."""

    name: str
    count: int
    us: float


def start_profiles(options: DecodeOptions) -> None:
    """Empty the file of profiles, if one is wanted.

    Raises:
        UserError: if the file cannot be written.
    """
    if options.profile is not None:
        with _writing(options.profile):
            options.profile.write_text("", encoding="utf-8")


def add_profile(options: DecodeOptions, title: str, work: Work, step: Step) -> None:
    """Profile one call of ``step``, which belongs to ``work``, and add its table to the file, if one is wanted.

    The table is written at once, as a long run may end before its last table. ``title`` is the table's title.

    Raises:
        UserError: if the profiler sees nothing, or the file cannot be written.
    """
    if options.profile is None:
        return
    text = render(title, entries_of(work, step, options.torch_device))
    with _writing(options.profile), options.profile.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, path, "choose another place with --profile") from error


@torch.no_grad()
def entries_of(work: Work, step: Step, device: torch.device) -> list[Entry]:
    """Return the kernels or operators that one call starts, the longest first; rewind before and afterwards.

    Raises:
        UserError: if the profiler sees nothing.
    """
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    for _ in range(2):  # the first time, what the profiler itself loads is in the way
        work.rewind()
        if cuda:
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=[activity]) as profiler:
            work.turn(step, 1)
            if cuda:
                torch.cuda.synchronize()
    work.rewind()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]
    if not events:
        raise UserError("torch's profiler sees nothing here (on CUDA it needs CUPTI): leave --profile out")
    entries = [
        Entry(event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in events
    ]
    return sorted(entries, key=lambda entry: -entry.us)


def render(title: str, entries: Sequence[Entry]) -> str:
    """Render the entries as a table with sums at its end."""
    count, total = sum(entry.count for entry in entries), sum(entry.us for entry in entries)
    lines = [("", "calls", "us", "us each", "share")]
    lines += [
        (
            entry.name if len(entry.name) <= LONGEST_NAME else f"{entry.name[: LONGEST_NAME - 4]} ...",
            str(entry.count),
            f"{entry.us:.1f}",
            f"{entry.us / entry.count:.1f}",
            f"{entry.us / total:.1%}",
        )
        for entry in entries
    ]
    lines.append(("all", str(count), f"{total:.1f}", "", ""))
    return "\n".join([title, "", *aligned(lines), "", ""])
