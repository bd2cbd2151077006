"""What the reports of all experiments share: spread over seeds, where numbers come from, files and plots."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from benchmarks.harness.store import replacing
from torch_prunepath.bench.results import commit
from torch_prunepath.console.report import machine

STEM = "report"
"""Name of a report's files: its text (.md), numbers (.json) and plot (.png)."""


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


def over_seeds(rows: Iterable[Mapping[str, Any]], by: Sequence[str], values: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of ``by``: of each value mean, least and most, and the number of rows.

    Rows keep the order of the first of their combination.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        {
            **dict(zip(by, key, strict=True)),
            **{name: dataclasses.asdict(spread_of([row[name] for row in group])) for name in values},
            "seeds": len(group),
        }
        for key, group in groups.items()
    ]


def shown(value: Mapping[str, float] | float, digits: int = 2, scale: float = 1.0) -> str:
    """Mean, and least and most if they differ; or one number."""
    if isinstance(value, float):
        return f"{scale * value:.{digits}f}"
    mean, least, most = (f"{scale * value[name]:.{digits}f}" for name in ("mean", "least", "most"))
    return mean if least == most else f"{mean} [{least}, {most}]"


def origin(command_line: str, given: str | None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What every record says of where it comes from: hardware, versions, command line and commit.

    Args:
        command_line: that made it.
        given: the commit, if the caller knows better than git.
        packages: whose versions matter besides the usual ones, where they are installed.
    """
    about = machine()
    about["versions"] |= {name: metadata.version(name) for name in packages if util.find_spec(name) is not None}
    return {"command_line": command_line, **about, "commit": given or commit()}


def origins(records: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Hardware, versions and commits of records, each once, as text."""
    records = list(records)
    return {key: sorted({_said(record.get(key)) for record in records}) for key in ("hardware", "versions", "commit")}


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items())
    return str(value)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def write(place: Path, text: str, numbers: Any, stem: str = STEM) -> str:
    """Keep a report's text and numbers, if ``place`` is a folder of results; the numbers as JSON.

    Raises:
        UserError: if they cannot be written.
    """
    encoded = json.dumps(numbers, indent=1, allow_nan=False)
    if not place.is_file():
        for suffix, content in ((".md", text), (".json", encoded)):
            with replacing(place / f"{stem}{suffix}") as part:
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


def look(number: int) -> dict[str, str]:
    """Colour and line of the curve with this number: thirty of them differ."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}


def save(drawn: Any, place: Path, stem: str = STEM) -> str | None:
    """Keep a figure, if ``place`` is a folder of results; where.

    Raises:
        UserError: if it cannot be written.
    """
    if place.is_file():
        return None
    path = place / f"{stem}.png"
    with replacing(path) as part:
        drawn.savefig(part, format="png", dpi=150)
    return str(path)
