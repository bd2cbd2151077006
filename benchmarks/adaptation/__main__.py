"""The command line: ``run`` and ``report``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.adaptation import __doc__ as about
from benchmarks.adaptation.methods import METHODS
from benchmarks.adaptation.options import Budget, Settings, changes, texts
from benchmarks.adaptation.report import report
from benchmarks.adaptation.runs import plan, work
from torch_prunepath.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Both subcommands."""
    top = argparse.ArgumentParser(
        prog="benchmarks.adaptation", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="train and measure", allow_abbrev=False))
    tables = commands.add_parser("report", help="tables and a plot of what has been measured", allow_abbrev=False)
    tables.add_argument("folder", type=Path, help="the output of run")
    tables.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    return top


def _add_run(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help="folder, GGUF file or hub name of a dense causal language model")
    add("-o", "--output", type=Path, required=True, help="folder of results; may hold earlier ones")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=" ".join(METHODS))
    add("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9], metavar="SHARE")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--lr", type=float, nargs="+", default=[2e-4], help="grid of peak learning rates, the same for every method")
    add("--set", action="append", default=[], metavar="[METHOD:]FIELD=VALUE", dest="fields", help="as often as needed")
    add("--data", type=Path, help="folder with books_train.txt.xz, books_test.txt.xz and wikitext2_test.raw.txt.gz")
    add("--text-train", type=Path, metavar="FILE", help="text to train on (plain, .gz or .xz)")
    add("--text-test", action="append", metavar="NAME=FILE", help="text to measure on; may be given several times")
    add("--tokens", type=int, default=5_800_000, help="of training a run (default: 5.8 million)")
    add("--context", type=int, default=512, help="tokens a window (default: 512)")
    add("--batch-tokens", type=int, default=16384, help="tokens a step (default: 16384)")
    add("--accumulation", type=int, default=1, help="batches a step (default: 1)")
    add("--windows", type=int, default=64, help="of each text to measure on, at most (default: 64)")
    add("--search-windows", type=int, default=8, help="of these, to search tau on (default: 8)")
    add("--eval-rows", type=int, default=8, help="windows measured at once (default: 8)")
    add("--calibration-tokens", type=int, default=16384)
    add("--seconds", type=float, help="of training a run, at most; a run cut short is marked")
    add("--session-seconds", type=float, help="start no run later than this")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="train in bfloat16 autocast; perplexity is always measured in float32")
    add("--compile", action="store_true", help="compile what lies outside the FFNs")
    add("--commit", help="what results say they were made from (default: git's answer)")
    add("--json", action="store_true", help="print which runs were done as JSON")


def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Train and measure; which runs were done, as text."""
    a = arguments
    try:
        torch.empty(0, device=a.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {a.device}: this machine has none: leave it out, or give cpu") from error
    for lr in a.lr:
        if not lr > 0:
            raise UserError(f"--lr {lr} must be positive")
    train, tests = texts(a.data, a.text_train, a.text_test)
    settings = Settings(
        model=a.model,
        train_text=train,
        test_texts=tests,
        output=a.output,
        budget=Budget(a.tokens, a.context, a.batch_tokens, a.accumulation),
        sparsities=tuple(sorted(set(a.sparsity))),
        device=a.device,
        bf16=a.bf16,
        compile=a.compile,
        windows=a.windows,
        search_windows=a.search_windows,
        eval_rows=a.eval_rows,
        calibration_tokens=a.calibration_tokens,
        seconds=a.seconds,
        session_seconds=a.session_seconds,
        commit=a.commit,
        command_line=command_line,
    )
    fields = changes(a.fields, {method: METHODS[method].fields for method in a.methods})
    found = work(settings, plan(settings, fields, a.lr, a.seeds))
    if a.json:
        return json.dumps(found)
    return ", ".join(f"{len(names)} {kind}" for kind, names in found.items())


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "run":
            print(run(arguments, shlex.join(["python", "-m", "benchmarks.adaptation", *argv])))
        else:
            print(report(arguments.folder, as_json=arguments.json))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
