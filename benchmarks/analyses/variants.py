"""Perplexity of variants of one method, after conversion and after training: what two analyses are made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.analyses.study import CONVERTED, TRAINED, Analysis, Part, Study, product
from benchmarks.harness import Job
from benchmarks.harness.report import look, markdown, over_seeds, shown
from benchmarks.harness.store import Record
from benchmarks.harness.task import Row

METHOD = "ours"
HELD = "held"


def parts_of(study: Study, variants: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any]) -> list[Part]:
    """What is to be done: a model for each variant and seed.

    Args:
        study: the analysis.
        variants: settings of each, by name.
        common: settings of all, which those of a variant precede.
    """
    # Ours, for one sparsity or for all of several.
    method = HELD if len(study.shares) == 1 else METHOD
    everywhere = {**common, **study.settings([method])[method]}
    found = []
    for name, seed in product(list(variants), study.arguments.seeds):
        job = study.job(method, {**everywhere, **variants[name]}, seed)

        def do(record: Record, job: Job = job, name: str = name) -> list[Row]:
            rows: list[Row] = []
            trained = study.make(job, record, lambda model: rows.extend(study.measured(model, CONVERTED)))
            if study.trains:
                rows += study.measured(trained.model, TRAINED)
            return [{"variant": name, **row} for row in rows]

        found.append(study.part(f"{name}-seed{seed}", {**study.about(job), "variant": name}, do))
    return found


def analysis(
    name: str,
    about: str | None,
    title: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    check: Callable[[argparse.Namespace], None],
    plan: Callable[[Study], list[Part]],
) -> Analysis:
    """An analysis that compares variants, its tables under a title."""

    def titled(rows: Sequence[Row]) -> list[str]:
        return [f"# {title}", *table(rows)]

    return Analysis(name, about, add_arguments, check, plan, summary, titled, plot)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows over seeds."""
    measured = [row for row in rows if "perplexity" in row]
    return over_seeds(measured, ("variant", "when", "text", "asked"), ("perplexity", "sparsity", "tau"))


def table(rows: Sequence[Row]) -> list[str]:
    """For each text and time a table: a line a variant, a column a sparsity."""
    shares = sorted({row["asked"] for row in rows})
    lines: list[str] = []
    for text, when in dict.fromkeys((row["text"], row["when"]) for row in rows):
        cells: dict[str, dict[float, str]] = {}
        for row in rows:
            if (row["text"], row["when"]) == (text, when):
                other = row["sparsity"]["mean"]
                apart = f" at {other:.1%}" if abs(other - row["asked"]) > 0.005 else ""
                cells.setdefault(row["variant"], {})[row["asked"]] = shown(row["perplexity"]) + apart
        body = [[name, *(found.get(share, "") for share in shares)] for name, found in cells.items()]
        lines += ["", f"## {text}, {when}", ""]
        lines += markdown(["variant", *(f"{share:.0%}" for share in shares)], body)
    return lines


def plot(drawn: Any, rows: Sequence[Row]) -> None:
    """The first text: a panel for each time."""
    text = rows[0]["text"]
    times = [when for when in (CONVERTED, TRAINED) if any(row["when"] == when for row in rows)]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, when in zip(drawn.subplots(1, len(times), squeeze=False)[0], times, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if (row["variant"], row["when"], row["text"]) == (name, when, text)]
            own.sort(key=lambda row: row["sparsity"]["mean"])
            across = [100 * row["sparsity"]["mean"] for row in own]
            style = look(number)
            axes.plot(across, [row["perplexity"]["mean"] for row in own], marker=".", label=name, **style)
            bounds = ([row["perplexity"][bound] for row in own] for bound in ("least", "most"))
            axes.fill_between(across, *bounds, color=style["color"], alpha=0.2)
        axes.set(title=f"{text}, {when}", xlabel="inactive share of FFN neurons (%)", ylabel="perplexity", yscale="log")
    axes.legend(fontsize="x-small")
