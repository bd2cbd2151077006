"""Perplexity and realised sparsity of one checkpoint over tau: figure 8 of arXiv 2605.28283.

lm-eval's tasks over tau are ``prunepath sweep``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.adaptation.measure import Constant, TauKnob, perplexity_row
from benchmarks.analyses.study import Part, Row, Study, add_checkpoints, add_options, over_seeds, product, shown
from benchmarks.common.report import markdown
from torch_prunepath import set_tau
from torch_prunepath.config import check_tau
from torch_prunepath.console.errors import UserError, as_user_error

NAME = "taus"
METHODS = ("ours", "held", "lte", "prunepath")
TAUS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
DENSE = "dense"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the analysis takes."""
    add_options(command, sparsity=[0.3, 0.9])
    add_checkpoints(command)
    text = "models to make, unless there are checkpoints (default: ours, for all of --sparsity)"
    command.add_argument("--methods", nargs="*", choices=METHODS, metavar="METHOD", help=text)
    command.add_argument("--tau", type=float, nargs="+", default=list(TAUS), help="the sweep")


def work(arguments: argparse.Namespace, command_line: str) -> tuple[str, str]:
    """Measure what is not measured yet; the table and the results as text."""
    with as_user_error(ValueError):
        taus = sorted({check_tau(tau) for tau in arguments.tau}, reverse=True)
    methods = arguments.methods
    if methods is None:
        methods = [] if arguments.checkpoint else ["ours"]
    if not methods and not arguments.checkpoint:
        raise UserError("there is no model to sweep: give --checkpoint NAME=DIR or --methods")
    study = Study(NAME, arguments, command_line)
    parts = study.do([_dense(study), *_made(study, methods, taus), *_loaded(study, taus)])
    by = ("model", "text", "asked_tau")
    rows = over_seeds((row for part in parts for row in part["rows"]), by, ("perplexity", "sparsity"))
    return study.finish(parts, rows, table(rows), lambda drawn: plot(drawn, rows))


def _dense(study: Study) -> Part:
    about = {"dense": study.material.model_key(), "texts": study.material.fingerprints}

    def do() -> tuple[list[Row], Mapping[str, Any]]:
        model, knob = study.material.dense(), Constant(0.0)
        rows = [
            {"model": DENSE, "text": text, "asked_tau": 1.0, **perplexity_row(model, knob, window_NC, _at_once(study))}
            for text, window_NC in study.material.texts.items()
        ]
        return rows, {}

    return Part(DENSE, about, do)


def _made(study: Study, methods: Sequence[str], taus: Sequence[float]) -> list[Part]:
    fields, found = study.fields(methods), []
    for method, seed in product(methods, study.arguments.seeds):
        run = study.run(method, fields[method], seed)

        def do(run: Any = run) -> tuple[list[Row], Mapping[str, Any]]:
            adapted, said = study.make(run)
            return sweep(study, run.method, adapted.model, taus), said

        found.append(Part(f"{method}-seed{seed}", {**study.about(run), "taus": list(taus)}, do))
    return found


def _loaded(study: Study, taus: Sequence[float]) -> list[Part]:
    found = []
    for name, folder in study.checkpoints().items():

        def do(name: str = name, folder: Any = folder) -> tuple[list[Row], Mapping[str, Any]]:
            return sweep(study, name, study.load(folder), taus), {}

        found.append(Part(name, {**study.about_checkpoint(folder), "taus": list(taus), "name": name}, do))
    return found


def sweep(study: Study, name: str, model: Any, taus: Sequence[float]) -> list[Row]:
    """A row for each tau and text."""
    knob, rows = TauKnob(model, _at_once(study)), []
    for tau in taus:
        set_tau(model, tau)
        for text, window_NC in study.material.texts.items():
            found = perplexity_row(model, knob, window_NC, _at_once(study))
            rows.append({"model": name, "text": text, "asked_tau": tau, **found})
    return rows


def _at_once(study: Study) -> int:
    return study.settings.eval_rows


def table(rows: Sequence[Row]) -> list[str]:
    """For each text a table: a line a model and tau."""
    lines = ["# Perplexity and realised sparsity over tau"]
    for text in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == text]
        body = [
            [row["model"], f"{row['asked_tau']:g}", shown(row["sparsity"], 1, 100), shown(row["perplexity"])]
            for row in own
        ]
        lines += ["", f"## {text}", "", *markdown(["model", "tau", "sparsity (%)", "perplexity"], body)]
    return lines


def plot(drawn: Any, rows: Sequence[Row]) -> None:
    """The first text: sparsity against tau, and perplexity against sparsity."""
    text = rows[0]["text"]
    own = [row for row in rows if row["text"] == text]
    tau_axes, axes = drawn.subplots(1, 2)
    for number, model in enumerate(dict.fromkeys(row["model"] for row in own)):
        points = [row for row in own if row["model"] == model]
        perplexity = [row["perplexity"]["mean"] for row in points]
        if model == DENSE:
            axes.axhline(perplexity[0], color="0.6", linestyle="--", label=model)
            continue
        shares = [100 * row["sparsity"]["mean"] for row in points]
        color = f"C{number % 10}"
        tau_axes.plot([row["asked_tau"] for row in points], shares, marker=".", color=color, label=model)
        axes.plot(shares, perplexity, marker=".", color=color, label=model)
        bounds = ([row["perplexity"][bound] for row in points] for bound in ("least", "most"))
        axes.fill_between(shares, *bounds, color=color, alpha=0.2)
    tau_axes.set(xlabel="tau", ylabel="inactive share of FFN neurons (%)")
    axes.set(title=text, xlabel="inactive share of FFN neurons (%)", ylabel="perplexity", yscale="log")
    axes.legend(fontsize="small")
