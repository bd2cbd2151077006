"""Perplexity and realised sparsity of one checkpoint over tau: figure 8 of arXiv 2605.28283.

    python -m benchmarks taus run --model DIR_OR_GGUF --data FOLDER --checkpoint NAME=DIR -o OUT
    python -m benchmarks taus report OUT

lm-eval's tasks over tau are ``prunepath sweep``.

Models are converted and trained as ``benchmarks books`` does it, on the same texts; without ``--steps`` nothing is
trained. Each part writes one JSON file once it is done, and is not done again. ``results.json``, ``results.md`` and
``results.png`` in the folder are those of the last command; ``OUT/cache`` can be removed when all is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.analyses.study import Analysis, Part, Study, add_checkpoints, add_options
from benchmarks.harness import Trained
from benchmarks.harness.knobs import Constant, TauKnob
from benchmarks.harness.report import markdown, over_seeds, shown
from benchmarks.harness.task import Row
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


def check(arguments: argparse.Namespace) -> None:
    """Refuse options before anything is loaded; without any, models are made by ours.

    Raises:
        UserError: if a tau is outside (0, 1], or there is no model to sweep.
    """
    with as_user_error(ValueError):
        arguments.tau = sorted({check_tau(tau) for tau in arguments.tau}, reverse=True)
    if arguments.methods is None:
        arguments.methods = [] if arguments.checkpoint else ["ours"]
    if not arguments.methods and not arguments.checkpoint:
        raise UserError("there is no model to sweep: give --checkpoint NAME=DIR or --methods")


def plan(study: Study) -> list[Part]:
    """The dense model, then a sweep of each other."""
    taus, methods = study.arguments.tau, study.arguments.methods
    about = {name: getattr(study.task, name) for name in ("weights", "about", "model")}
    dense = study.part(DENSE, about, lambda record: _dense(study))
    return [dense, *study.models(methods, {}, lambda name, model: sweep(study, name, model, taus), taus=taus)]


def _dense(study: Study) -> list[Row]:
    trained = Trained(study.task.fresh(0), Constant(0.0))
    same = {"model": DENSE, "asked_tau": 1.0}
    return [{**same, "text": text, **study.task.measure(trained, text)} for text in study.task.texts]


def sweep(study: Study, name: str, model: Any, taus: Sequence[float]) -> list[Row]:
    """A row for each tau and text."""
    trained, rows = Trained(model, TauKnob(model)), []
    for tau in taus:
        set_tau(model, tau)
        for text in study.task.texts:
            rows.append({"model": name, "text": text, "asked_tau": tau, **study.task.measure(trained, text)})
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows over seeds."""
    return over_seeds(rows, ("model", "text", "asked_tau"), ("perplexity", "sparsity"))


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return Analysis(NAME, __doc__, add_arguments, check, plan, summary, table, plot).main(argv)
