"""What the benchmarks' reports have in common: spread over seeds, where numbers come from, files and plots."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from benchmarks.common.store import replacing
from torch_prunepath.bench.results import commit
from torch_prunepath.console.report import machine

STEM = "report"
"""Of a report's files: its text (.md), numbers (.json) and plot (.png)."""


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: of them.
        least: of them.
        most: of them.
    """

    mean: float
    least: float
    most: float


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, least and most of at least one number."""
    return Spread(statistics.fmean(values), min(values), max(values))


def origin(command_line: str, given: str | None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What every run says of where it comes from: hardware, versions, command line and commit.

    Args:
        command_line: that made it.
        given: the commit, if the caller knows better than git.
        packages: whose versions matter besides the usual ones, where they are installed.
    """
    about = machine()
    about["versions"] |= {name: metadata.version(name) for name in packages if util.find_spec(name) is not None}
    return {"command_line": command_line, **about, "commit": given or commit()}


def origins(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Hardware, versions and commits of runs, each once, as text."""
    runs = list(runs)
    return {key: sorted({_said(run.get(key)) for run in runs}) for key in ("hardware", "versions", "commit")}


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items())
    return str(value)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def write(folder: Path, text: str, numbers: Any, stem: str = STEM) -> str:
    """Keep a report's text and numbers; the numbers as JSON.

    Raises:
        UserError: if they cannot be written.
    """
    encoded = json.dumps(numbers, indent=1, allow_nan=False)
    for suffix, content in ((".md", text), (".json", encoded)):
        with replacing(folder / f"{stem}{suffix}") as part:
            part.write_text(content + "\n", encoding="utf-8")
    return encoded


def figure(**options: Any) -> Any:
    """An empty figure; None, and a line that says how to get it, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    return Figure(**{"layout": "constrained", **options})


def save(drawn: Any, folder: Path, stem: str = STEM) -> str:
    """Keep a figure; where.

    Raises:
        UserError: if it cannot be written.
    """
    path = folder / f"{stem}.png"
    with replacing(path) as part:
        drawn.savefig(part, format="png", dpi=150)
    return str(path)
