"""The report of runs that measure scores on two halves: a table, a plot and the same as JSON.

Of several runs that differ in learning rates or settings, the one is reported that the selection half prefers, for each
seed by itself; runs of different length are reported apart. Where halves are alike, both can be reported, each with the
run that the other prefers: twice the rows, and none of them had a say in its own choice.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.methods import METHODS
from benchmarks.harness.report import figure, origins, save, spread_of, write
from benchmarks.harness.store import Record
from benchmarks.harness.task import Row
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import aligned


@dataclass(frozen=True)
class Halves:
    """Which halves are reported, and how one chooses.

    Attributes:
        score: of a half; larger is better.
        both: report each half with the run that the other prefers, and not the report half alone.
    """

    score: Callable[[Row], float] = lambda half: float(half["score"])
    both: bool = False

    @property
    def ways(self) -> list[tuple[str, str]]:
        """The half that chooses, and the one that is reported."""
        return [("select", "report"), ("report", "select")] if self.both else [("select", "report")]


Found = tuple[Row, Record]
"""What a half says, and the run that it says it of."""


def rows_of(runs: Mapping[str, Record], metrics: Sequence[str], halves: Halves = Halves()) -> list[Row]:
    """One row a task, method, target and length: mean, least and largest of each metric over seeds.

    Args:
        runs: by name.
        metrics: of the reported halves; a task lacks those that it has no word for.
        halves: which are reported.

    Raises:
        UserError: if there is no run that ended well, or if runs of a task cannot be compared.
    """
    _check_alike(runs)
    points: dict[tuple[Any, ...], list[Found]] = {}
    for run in runs.values():
        job = run["job"]
        for row in run["rows"]:
            if "select" in row and row["asked"] is not None:
                key = (job["task"], job["method"], row["asked"], job["steps"], job["seed"])
                points.setdefault(key, []).append((row, run))
    if not points:
        raise UserError("no run has ended well: see the runs' files, and run again with smaller learning rates")
    groups: dict[tuple[Any, ...], list[list[Found]]] = {}
    for (*group, _), rivals in sorted(points.items(), key=lambda item: _order(item[0])):
        groups.setdefault(tuple(group), []).append([_chosen(rivals, halves, *way) for way in halves.ways])
    return [_row(*group, members, metrics) for group, members in groups.items()]  # type: ignore[misc]


def _chosen(rivals: Sequence[Found], halves: Halves, by: str, shown: str) -> Found:
    point, run = max(rivals, key=lambda rival: halves.score(rival[0][by]))
    return point[shown], run


def _check_alike(runs: Mapping[str, Record]) -> None:
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, run in runs.items():
        job = run["job"]
        for what, mine in (("weights", job["weights"]), ("data", job["about"]["data"])):
            other, value = first.setdefault((job["task"], what), (name, mine))
            if value != mine:
                kind = "models" if what == "weights" else "data, or data that were cut otherwise"
                raise UserError(f"{other} and {name} are of different {kind}: keep each in a folder of its own")


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    task, method, target, steps, seed = key
    return task, steps, target, list(METHODS).index(method), seed


def _row(
    task: str, method: str, target: float, steps: int, members: Sequence[Sequence[Found]], metrics: Sequence[str]
) -> Row:
    halves = [[half for half, _ in found] for found in members]
    jobs = [run["job"] for found in members for _, run in found]
    spreads: dict[str, Any] = {}
    for metric in metrics:
        if all(half.get(metric) is not None for found in halves for half in found):
            spreads[metric] = dataclasses.asdict(spread_of([_over_rows(found, metric) for found in halves]))
    return {
        "task": task,
        "method": method,
        "target": target,
        "steps": steps,
        "realised_sparsity": statistics.fmean(_over_rows(found, "sparsity") for found in halves),
        "seeds": [found[0][1]["job"]["seed"] for found in members],
        "lr": [job["lr"] for job in jobs],
        "settings": [job["settings"] for job in jobs],
        "metrics": spreads,
    }


def _over_rows(halves: Sequence[Row], metric: str) -> float:
    """The mean over halves, by their rows."""
    if len(halves) == 1:
        return float(halves[0][metric])
    return float(sum(half["rows"] * half[metric] for half in halves) / sum(half["rows"] for half in halves))


def table(rows: Sequence[Row], metrics: Sequence[str], scale: Mapping[str, float]) -> list[str]:
    """Aligned columns; behind each mean half of what lies between the seeds' least and most."""
    shown = [metric for metric in metrics if any(metric in row["metrics"] for row in rows)]
    lines = [("task", "method", "target", "realised", "steps", "seeds", *shown, "lr", "settings")]
    lines += [_cells(row, shown, scale) for row in rows]
    return list(aligned(lines))


def _cells(row: Row, shown: Sequence[str], scale: Mapping[str, float]) -> tuple[str, ...]:
    values = []
    for metric in shown:
        found = row["metrics"].get(metric)
        if found is None:
            values.append("")
            continue
        half = (found["most"] - found["least"]) / 2 * scale.get(metric, 1.0)
        values.append(f"{found['mean'] * scale.get(metric, 1.0):.2f}" + (f" +-{half:.2f}" if half else ""))
    settings = {" ".join(f"{k}={v}" for k, v in fields.items()) for fields in row["settings"]}
    about = (f"{row['target']:.0%}", f"{row['realised_sparsity']:.1%}", str(row["steps"]), str(len(row["seeds"])))
    rates = ",".join(f"{lr:g}" for lr in dict.fromkeys(row["lr"]))
    return (row["task"], row["method"], *about, *values, rates, " | ".join(sorted(settings)))


def write_report(
    place: Path,
    runs: Mapping[str, Record],
    metrics: Sequence[str],
    scale: Mapping[str, float],
    halves: Halves = Halves(),
) -> tuple[dict[str, Any], str]:
    """Make ``report.json``, ``report.md`` and ``report.png`` of the runs; the same as an object and as text.

    Raises:
        UserError: if no run ended well or a file cannot be written.
    """
    rows = rows_of(runs, metrics, halves)
    lines = table(rows, metrics, scale)
    failed = {name: run["failed"] for name, run in runs.items() if run["failed"]}
    missing = [
        f"{name}: {row['asked']:.0%} is out of reach, {row['unreachable']}"
        for name, run in runs.items()
        for row in run["rows"]
        if "unreachable" in row
    ]
    about = origins(runs.values())
    plot = _plot(rows, metrics, scale, place)
    results = {"rows": rows, "both_halves": halves.both, "failed": failed, **about, "plot": plot}
    notes = [f"{key}: {'; '.join(values)}" for key, values in about.items()]
    notes += [f"failed: {name}: {reason}" for name, reason in failed.items()]
    notes += missing
    write(place, "\n".join(["```", *lines, "```", "", *(f"- {note}" for note in notes)]), results)
    return results, "\n".join([*lines, "", *notes])


def _plot(rows: Sequence[Row], metrics: Sequence[str], scale: Mapping[str, float], place: Path) -> str | None:
    """A picture a task and metric; None, and a line that says how to get it, where matplotlib is missing."""
    panels = sorted({(row["task"], row["steps"], metric) for row in rows for metric in row["metrics"]})
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    drawn = figure(figsize=(4.5 * across, 3.6 * down))
    if drawn is None:
        return None
    for axes, (task, steps, metric) in zip(drawn.subplots(down, across, squeeze=False).flat, panels, strict=False):
        chosen = [row for row in rows if (row["task"], row["steps"]) == (task, steps) and metric in row["metrics"]]
        _draw(axes, chosen, metric, scale.get(metric, 1.0))
        axes.set(title=f"{task}, {steps} steps", xlabel="inactive share of FFN neurons (%)", ylabel=metric)
        axes.legend(fontsize="x-small")
    return save(drawn, place)


def _draw(axes: Any, rows: Sequence[Row], metric: str, scale: float) -> None:
    for method in METHODS:
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["realised_sparsity"])
        if not own:
            continue
        found = [row["metrics"][metric] for row in own]
        means = [scale * each["mean"] for each in found]
        if METHODS[method].dense:
            axes.axhline(means[0], linestyle="--", color="0.3" if method == "dense" else "0.6", label=method)
            continue
        below = [scale * (each["mean"] - each["least"]) for each in found]
        above = [scale * (each["most"] - each["mean"]) for each in found]
        places = [100 * row["realised_sparsity"] for row in own]
        axes.errorbar(places, means, yerr=[below, above], fmt="o-", capsize=3, label=method)
