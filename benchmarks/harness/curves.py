"""The report of runs that measure perplexity: tables and a plot of it against sparsity, over seeds.

A method's learning rate is the one with the lowest perplexity on the held-out end of the training text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.methods import METHODS
from benchmarks.harness.report import figure, look, markdown, origins, save, spread_of, write
from benchmarks.harness.store import Record, records_of

DENSE = "dense"
BOOKS = "books"
"""Name of the task whose runs these are."""
VALID = "valid"
"""The text that learning rates are chosen on: the end of the training text, which no run trains on."""


@dataclass(frozen=True)
class Point:
    """One method at one sparsity on one text, over seeds.

    Attributes:
        asked: sparsity.
        sparsity: realised, the mean over seeds.
        perplexity: mean over seeds.
        low: of the seeds.
        high: of the seeds.
        seeds: how many.
        lr: chosen.
        cut: whether a run was cut short.
    """

    asked: float
    sparsity: float
    perplexity: float
    low: float
    high: float
    seeds: int
    lr: float
    cut: bool


def report(place: Path, *, as_json: bool) -> str:
    """Write the tables, their numbers and the plot; the tables (or numbers) as text.

    Args:
        place: folder of results, or a file that holds runs.
        as_json: answer the numbers.

    Raises:
        UserError: if there is no run, or the folder cannot be written.
    """
    results = list(records_of(place, [BOOKS]).values())
    groups: dict[str, list[Record]] = {}
    for result in results:
        groups.setdefault(_budget(result), []).append(result)
    curves = {title: curves_of(group) for title, group in groups.items()}
    texts = {title: list(dict.fromkeys(r["text"] for g in group for r in g["rows"])) for title, group in groups.items()}
    lines: list[str] = ["# Perplexity against sparsity after equal training"]
    for title, group in groups.items():
        lines += ["", f"## {title}", "", *_about(group)]
        for text in texts[title]:
            lines += ["", f"### {text}", "", *table(curves[title], text), *_own_settings(group, text)]
        lines += ["", "### Runs", "", *_runs(group)]
    numbers = {
        title: {label: {text: [vars(p) for p in points] for text, points in by.items()} for label, by in found.items()}
        for title, found in curves.items()
    }
    text = "\n".join(lines)
    summary = write(place, text, numbers)
    _plot(curves, place)
    return summary if as_json else text


def _budget(result: Record) -> str:
    """What runs must share to be compared."""
    job = result["job"]
    about = job["about"]
    budget = about["budget"]
    parts = [
        job["model"],
        f"{job['steps'] * budget['batch_tokens']:,} tokens of {about['texts']['train']}",
        f"context {budget['context']}, {budget['batch_tokens']} tokens a step",
        "bfloat16 autocast" if job["autocast"] else "float32",
        f"{about['windows']} windows a text",
    ]
    return ", ".join(parts)


def label_of(job: Mapping[str, Any]) -> str:
    """The method, and what was changed of it."""
    title = METHODS[job["method"]].title if job["method"] in METHODS else job["method"]
    changed = ", ".join(f"{name}={value}" for name, value in sorted(job["settings"].items()))
    return f"{title} ({changed})" if changed else title


def _trained_for(job: Mapping[str, Any]) -> float | None:
    """The sparsity that the job alone is for; None: it has one run for all."""
    return job["sparsity"][0] if METHODS[job["method"]].each else None


Curves = dict[str, dict[str, list[Point]]]
"""Points by label and text."""


def curves_of(results: Sequence[Record]) -> Curves:
    """Points of every method, with the learning rate chosen for each run that it needs."""
    order = list(METHODS)
    place = {method: number for number, method in enumerate(order)}
    found: Curves = {}
    keys: dict[tuple[str, float | None], list[Record]] = {}
    for result in sorted(results, key=lambda r: place.get(r["job"]["method"], len(order))):
        keys.setdefault((label_of(result["job"]), _trained_for(result["job"])), []).append(result)
    for (label, _), group in keys.items():
        chosen = best_lr(group)
        if chosen is None:
            continue
        own = [result for result in group if result["job"]["lr"] == chosen and not result["failed"]]
        for text, asked in dict.fromkeys((row["text"], row["asked"]) for r in own for row in r["rows"]):
            point = _point(own, text, asked, chosen)
            if point is not None:
                found.setdefault(label, {}).setdefault(text, []).append(point)
    for by in found.values():
        for points in by.values():
            points.sort(key=lambda point: point.asked)
    return found


def best_lr(group: Sequence[Record]) -> float | None:
    """The learning rate with the lowest mean log perplexity on ``valid``; of those with most seeds that trained."""
    scores: dict[float, list[float]] = {}
    for result in group:
        rows = [r for r in result["rows"] if r["text"] == VALID and r["asked"] is not None and "perplexity" in r]
        if rows and not result["failed"]:
            mean = statistics.mean(math.log(row["perplexity"]) for row in rows)
            scores.setdefault(result["job"]["lr"], []).append(mean)
    if not scores:
        return None
    # A rate that was tried on some seeds only may have been lucky with them.
    return min(scores, key=lambda lr: (-len(scores[lr]), statistics.mean(scores[lr])))


def _point(results: Iterable[Record], text: str, asked: float | None, lr: float) -> Point | None:
    rows, cut = [], False
    for result in results:
        rows += [r for r in result["rows"] if (r["text"], r["asked"]) == (text, asked) and "perplexity" in r]
        cut |= result["training"]["cut"]
    if asked is None or not rows:
        return None
    over = spread_of([row["perplexity"] for row in rows])
    realised = statistics.mean(row["sparsity"] for row in rows)
    return Point(asked, realised, over.mean, over.least, over.most, len(rows), lr, cut)


def table(curves: Curves, text: str) -> list[str]:
    """Markdown: a line a method, a column a sparsity."""
    shares = sorted({p.asked for by in curves.values() for p in by.get(text, []) if p.asked})
    dense = next((by[text][0].perplexity for label, by in curves.items() if label == METHODS[DENSE].title), None)
    rows = []
    for label, by in curves.items():
        points = {point.asked: point for point in by.get(text, [])}
        rates = ", ".join(sorted({f"{point.lr:g}" for point in points.values()}))
        cells = [_cell(points[share], dense) if share in points else "" for share in shares]
        if set(points) == {0.0}:
            cells = [_cell(points[0.0], None), *cells[1:]]
        rows.append([label, rates, *cells])
    return markdown(["method", "lr", *(f"{share:.0%}" for share in shares)], rows)


def _own_settings(group: Sequence[Record], text: str) -> list[str]:
    """Points at settings of a method's own, whatever sparsity comes of them, and sparsities out of reach."""
    lines = []
    for result in group:
        job = result["job"]
        name = f"{label_of(job)}, lr {job['lr']:g}, seed {job['seed']}"
        for row in result["rows"]:
            if row["text"] != text:
                continue
            if "unreachable" in row:
                lines.append(f"- {name}: {row['asked']:.0%} is out of reach, {row['unreachable']}")
            elif row["asked"] is None:
                found = f"{row['perplexity']:.2f} at {row['sparsity']:.1%}"
                lines.append(f"- {name}, {row['setting']} (tau {row['tau']:g}): {found}")
    return ["", *lines] if lines else []


def _cell(point: Point, dense: float | None) -> str:
    spread = f" [{point.low:.2f}, {point.high:.2f}]" if point.seeds > 1 else ""
    ratio = "" if dense is None else f" ({point.perplexity / dense:.2f}x)"
    other = f" at {point.sparsity:.1%}" if abs(point.sparsity - point.asked) > 0.005 else ""
    return f"{point.perplexity:.2f}{spread}{ratio}{other}{' †' if point.cut else ''}"


def _about(group: Sequence[Record]) -> list[str]:
    """Where the numbers come from."""
    lines = [
        *(f"- {key}: {'; '.join(texts)}" for key, texts in origins(group).items()),
        "",
        "Means over seeds, in square brackets the least and largest, in round ones relative to the fine-tuned dense",
        "model. The realised share is named where it is not the one asked for; TEAL's counts matrix inputs.",
        f"The learning rate is the best on {VALID!r}, the end of the training text, which no run trains on.",
    ]
    if any(r["training"]["cut"] for r in group):
        lines.append("† trained on fewer tokens: --seconds ran out.")
    return lines


def _runs(group: Sequence[Record]) -> list[str]:
    rows = []
    for result in group:
        job, training = result["job"], result["training"]
        only = _trained_for(job)
        share = "" if only is None else f" {only:.0%}"
        name = f"{label_of(job)}{share}, lr {job['lr']:g}, seed {job['seed']}"
        evaluation = result["evaluation_seconds"]
        rest = None if evaluation is None else max(0.0, result["seconds"] - evaluation - training["seconds"])
        cells = [f"{training['tokens']:,}", f"{training['tokens_per_second'] or 0:,.0f}"]
        cells += ["" if seconds is None else f"{seconds:.1f} s" for seconds in (training["seconds"], rest, evaluation)]
        cells.append(result["failed"] or "")
        rows.append([name, *cells])
    head = ["run", "tokens", "tokens/s", "training", "conversion and all else", "evaluation", ""]
    return markdown(head, rows)


def _plot(curves: Mapping[str, Curves], place: Path) -> None:
    """A panel for each budget and text."""
    panels = [
        (found, text) for found in curves.values() for text in dict.fromkeys(t for by in found.values() for t in by)
    ]
    drawn = figure(figsize=(5 * len(panels) + 3.5, 4.5)) if panels else None
    if drawn is None:
        return
    labels = list(dict.fromkeys(label for found in curves.values() for label in found))
    shown: dict[str, Any] = {}
    for axes, (found, text) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, by in found.items():
            shown.setdefault(label, _line(axes, label, by.get(text, []), look(labels.index(label))))
        axes.set(title=text, xlabel="inactive share of FFN neurons (%)", ylabel="perplexity", yscale="log")
    drawn.legend(handles=list(shown.values()), loc="outside right upper", fontsize="small")
    save(drawn, place)


def _line(axes: Any, label: str, points: Sequence[Point], style: Mapping[str, Any]) -> Any:
    if [point.asked for point in points] == [0.0]:
        return axes.axhline(points[0].perplexity, color="0.6", linestyle="--", label=label)
    across = [100 * point.sparsity for point in points]
    (line,) = axes.plot(across, [p.perplexity for p in points], marker="o", markersize=3, label=label, **style)
    axes.fill_between(across, [p.low for p in points], [p.high for p in points], color=style["color"], alpha=0.2)
    return line
