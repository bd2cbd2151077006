"""The numbers in lm-eval's results: one score a task and metric, and which metric of a task tells most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

TELLING = ("acc_norm", "acc", "exact_match", "f1", "bleu", "rougeL", "word_perplexity", "perplexity", "bits_per_byte")
"""Metrics that a table shows, the first that a task has."""


class Score(TypedDict):
    """A metric's value; its standard error, or None where lm-eval gives none; and whether more is better."""

    value: float
    stderr: float | None
    higher_is_better: bool | None


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Scores by task or group, then by metric, ``"acc"`` or with lm-eval's filter ``"exact_match,strict"``.

    What is no finite number is left out.
    """
    found: dict[str, dict[str, Score]] = {}
    for task, entries in {**results["results"], **results.get("groups", {})}.items():
        better = results.get("higher_is_better", {}).get(task, {})
        scores = {}
        for key, value in entries.items():
            metric, _, kind = key.partition(",")
            if not _is_number(value) or not kind or metric.endswith("_stderr"):
                continue
            stderr = entries.get(f"{metric}_stderr,{kind}")
            scores[metric if kind == "none" else key] = Score(
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                higher_is_better=better.get(metric),
            )
        if scores:
            found[task] = scores
    return found


def headline(scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[str]) -> dict[str, str]:
    """The metric to show of each task: those asked for that have scores, or, if none has (a tag), all that have."""
    shown = [task for task in tasks if task in scores] or list(scores)
    return {task: min(scores[task], key=_rank) for task in shown}


def _rank(metric: str) -> int:
    name = metric.partition(",")[0]
    return TELLING.index(name) if name in TELLING else len(TELLING)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
