"""Perplexity of variants of one method, after conversion and after training: what two analyses are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.analyses.study import CONVERTED, TRAINED, Part, Row, Study, over_seeds, product, shown
from benchmarks.common.report import markdown

METHOD = "ours"
HELD = "held"


def method_of(study: Study) -> str:
    """Ours, for one sparsity or for all of several."""
    return HELD if len(study.settings.sparsities) == 1 else METHOD


def parts_of(study: Study, variants: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any]) -> list[Part]:
    """What is to be done: a model for each variant and seed.

    Args:
        study: the analysis.
        variants: settings of each, by name.
        common: settings of all, which those of a variant precede.
    """
    method = method_of(study)
    everywhere = {**common, **study.fields([method])[method]}
    found = []
    for name, seed in product(list(variants), study.arguments.seeds):
        run = study.run(method, {**everywhere, **variants[name]}, seed)

        def do(run: Any = run, name: str = name) -> tuple[list[Row], Mapping[str, Any]]:
            rows: list[Row] = []

            def before(model: Any) -> None:
                rows.extend(study.measured(model, CONVERTED))

            adapted, said = study.make(run, before)
            if study.trains:
                rows += study.measured(adapted.model, TRAINED)
            return [{"variant": name, **row} for row in rows], said

        about = {**study.about(run), "variant": name, "sparsities": list(study.settings.sparsities)}
        found.append(Part(f"{name}-seed{seed}", about, do))
    return found


def finish(study: Study, parts: Sequence[Mapping[str, Any]], title: str) -> tuple[str, str]:
    """The table and the results as text."""
    measured = [row for part in parts for row in part["rows"] if "perplexity" in row]
    rows = over_seeds(measured, ("variant", "when", "text", "asked"), ("perplexity", "sparsity", "tau"))
    missing = [
        f"- {row['variant']}, {row['when']}, {row['text']}: {row['asked']:.0%} is out of reach, {row['unreachable']}"
        for part in parts
        for row in part["rows"]
        if "unreachable" in row
    ]
    lines = [f"# {title}", *table(rows), *(["", *missing] if missing else [])]
    return study.finish(parts, rows, lines, lambda drawn: plot(drawn, rows))


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
    if not rows:
        return
    text = rows[0]["text"]
    times = [when for when in (CONVERTED, TRAINED) if any(row["when"] == when for row in rows)]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, when in zip(drawn.subplots(1, len(times), squeeze=False)[0], times, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if (row["variant"], row["when"], row["text"]) == (name, when, text)]
            own.sort(key=lambda row: row["sparsity"]["mean"])
            across = [100 * row["sparsity"]["mean"] for row in own]
            look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            axes.plot(across, [row["perplexity"]["mean"] for row in own], marker=".", label=name, **look)
            bounds = ([row["perplexity"][bound] for row in own] for bound in ("least", "most"))
            axes.fill_between(across, *bounds, color=look["color"], alpha=0.2)
        axes.set(title=f"{text}, {when}", xlabel="inactive share of FFN neurons (%)", ylabel="perplexity", yscale="log")
    axes.legend(fontsize="x-small")
