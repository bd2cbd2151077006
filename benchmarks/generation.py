"""Generation against sparsity: a causal language model describes restaurants (E2E), dense and made sparse.

    python benchmarks/generation.py run --model DIR_OR_GGUF --data DIR --sparsity 0.3 0.5 0.7 --seeds 0 1 2 -o OUT
    python benchmarks/generation.py report OUT --data DIR

DIR of the data holds ``e2e_valid.jsonl.gz``, which is trained on, and ``e2e_test.jsonl.gz``, whose texts are scored
against all their references. Nothing is downloaded. Every method starts from the same fine-tuned dense model and takes
the same number of optimiser steps on the same data. BLEU and ROUGE-L need sacrebleu and rouge_score; a machine without
them keeps the texts in the runs' files, and ``report`` scores them where the packages are.

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
from benchmarks.common.options import check_positive, dispatch
from benchmarks.common.store import Run, Store
from benchmarks.tasks.e2e import TEST, E2ETask, references, score_run
from benchmarks.tasks.glue import read_rows
from benchmarks.tasks.options import add_options, options_of
from benchmarks.tasks.report import write_report
from benchmarks.tasks.runs import run_all
from torch_prunepath.console.errors import UserError

METRICS = ("bleu", "rouge_l")
SCALE = {"rouge_l": 100.0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that are not done yet")
    add_options(run, batch=32, lr=2e-4)
    run.add_argument("--eval-batch", type=int, default=128, help="rows a batch of generation")
    run.add_argument("--new-tokens", type=int, default=96, help="generated for a text, at most")
    run.add_argument("--meanings", type=int, help="generate for the first of the test file only (default: all)")
    report = commands.add_parser("report", help="score what is not scored yet; table and plot of the runs in a folder")
    report.add_argument("output", type=Path)
    report.add_argument("--data", type=Path, help="folder of the data; needed if there is something to score")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def run(arguments: argparse.Namespace) -> None:
    """``generation.py run``."""
    options = options_of(arguments)
    check_positive({name: getattr(arguments, name) for name in ("eval_batch", "new_tokens", "meanings")})
    torch.backends.cuda.matmul.allow_tf32 = False
    task = E2ETask(
        arguments.data,
        arguments.model,
        batch=arguments.batch,
        eval_batch=arguments.eval_batch,
        new_tokens=arguments.new_tokens,
        meanings=arguments.meanings,
        device=arguments.device,
    )
    outcome = run_all([task], options)
    words = f"{len(outcome['done'])} runs done, {len(outcome['skipped'])} were there: report {arguments.output}"
    print(json.dumps(outcome) if arguments.json else words)


def report(arguments: argparse.Namespace) -> None:
    """``generation.py report``."""
    store = Store(arguments.output)
    runs = store.all()
    score_all(store, runs, arguments.data)
    results, text = write_report(store, runs, METRICS, SCALE)
    print(json.dumps(results) if arguments.json else text)


def score_all(store: Store, runs: dict[str, Run], data: Path | None) -> None:
    """Score the runs that are not scored yet, and keep what that gives.

    Raises:
        UserError: if there are some, and data or a package is missing.
    """
    pending = {name: run for name, run in runs.items() if any("bleu" not in point["report"] for point in run["points"])}
    if not pending:
        return
    if data is None:
        raise UserError(f"{len(pending)} runs are not scored yet: name the folder of {TEST} with --data")
    texts = references(read_rows(data, TEST))
    for name, run in pending.items():
        score_run(run, texts)
        store.write(name, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return dispatch({"run": run, "report": report}, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
