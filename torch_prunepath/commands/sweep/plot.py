"""The curves of a sweep: a panel for each task, its metric against the realised sparsity, or the bytes read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_prunepath.console.output import writing
from torch_prunepath.console.plot import new_figure

PLOT = "sweep.png"


def save_plot(results: Mapping[str, Any], folder: Path, output: Path) -> str | None:
    """Save the curves; None, and a line that says how to get them, where matplotlib is missing."""
    headlines, (reference, *rows) = results["headlines"], results["rows"]
    by_bytes = any("target_bytes" in row for row in rows)
    axis = "FFN bytes read (%); labels: asked for" if by_bytes else "inactive share of FFN neurons (%); labels: tau"
    figure = new_figure(4.5 * len(headlines), 3.6)
    if figure is None:
        return None
    panels = figure.subplots(1, len(headlines), squeeze=False)[0]
    for axes, (task, metric) in zip(panels, headlines.items(), strict=True):
        scores = [row["scores"][task][metric] for row in rows]
        shares = [100 * row["bytes" if by_bytes else "sparsity"] for row in rows]
        axes.axhline(reference["scores"][task][metric]["value"], color="0.6", linestyle="--", label=reference["name"])
        errors = [score["stderr"] or 0.0 for score in scores]
        axes.errorbar(shares, [score["value"] for score in scores], errors, fmt="o-", capsize=3, label="sparse")
        for row, share, score in zip(rows, shares, scores, strict=True):
            axes.annotate(
                f"{row['target_bytes' if by_bytes else 'tau']:.3g}",
                (share, score["value"]),
                (3, 4),
                textcoords="offset points",
            )
        axes.set(title=task, xlabel=axis, ylabel=metric)
        axes.legend()
    with writing(output):
        figure.savefig(folder / PLOT, dpi=150)
    return str(output / PLOT)
