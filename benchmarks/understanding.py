"""Language understanding against sparsity: GLUE tasks, a dense encoder fine-tuned, then made sparse by each method.

    python benchmarks/understanding.py run --model DIR --data DIR --tasks rte mrpc --seeds 0 1 2 -o OUT
    python benchmarks/understanding.py report OUT --both-halves

DIR of the model is a folder in Hugging Face's layout (all-MiniLM-L6-v2, for instance), DIR of the data holds
``sst2_train.jsonl.gz``, ``sst2_dev.jsonl.gz`` and so on. Nothing is downloaded. Every method starts from the same
fine-tuned dense model and takes the same number of optimiser steps on the same data; ``dense-longer`` takes them and
stays dense. Dev sets are cut in two: learning rates and settings are chosen on one half, the other is reported; with
``--both-halves`` the other way round as well. (The rate of the fine-tuning before is chosen once, by the first half.)

Conversions are kept in ``OUT/cache``, which may be removed, and shared by processes with the same OUT. With
``--compile`` every method trains compiled, wherever it does not work by hooks, on the same batches padded to one shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # so that the packages beside this script are found
from benchmarks.common.options import dispatch
from benchmarks.common.store import Store
from benchmarks.tasks.glue import GLUE, GlueTask, preference
from benchmarks.tasks.options import add_options, options_of
from benchmarks.tasks.report import Halves, write_report
from benchmarks.tasks.runs import run_all
from torch_prunepath.console.errors import UserError

METRICS = ("accuracy", "f1")
PERCENT = {"accuracy": 100.0, "f1": 100.0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that are not done yet")
    add_options(run, batch=32, lr=1e-4)
    run.add_argument("--tasks", nargs="+", default=list(GLUE), choices=list(GLUE), metavar="TASK", help=", ".join(GLUE))
    run.add_argument("--length", type=int, default=128, help="tokens a row, at most")
    report = commands.add_parser("report", help="table and plot of the runs in a folder")
    report.add_argument("output", type=Path)
    words = "report both halves, each with the runs that the other prefers, in place of the report half alone"
    report.add_argument("--both-halves", action="store_true", help=words)
    report.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def run(arguments: argparse.Namespace) -> None:
    """``understanding.py run``."""
    options = options_of(arguments)
    if arguments.length < 8:
        raise UserError(f"--length {arguments.length} leaves too little text: give at least 8")
    torch.backends.cuda.matmul.allow_tf32 = False
    about = {"batch": arguments.batch, "length": arguments.length, "device": arguments.device}
    tasks = [GlueTask(name, arguments.data, arguments.model, **about) for name in dict.fromkeys(arguments.tasks)]
    outcome = run_all(tasks, options)
    words = f"{len(outcome['done'])} runs done, {len(outcome['skipped'])} were there: report {arguments.output}"
    print(json.dumps(outcome) if arguments.json else words)


def report(arguments: argparse.Namespace) -> None:
    """``understanding.py report``."""
    store = Store(arguments.output)
    halves = Halves(preference, both=arguments.both_halves)
    results, text = write_report(store, store.all(), METRICS, PERCENT, halves)
    print(json.dumps(results) if arguments.json else text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return dispatch({"run": run, "report": report}, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
