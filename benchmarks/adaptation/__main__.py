"""The command line: ``run`` and ``report``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from benchmarks.adaptation import __doc__ as about
from benchmarks.adaptation.methods import METHODS
from benchmarks.adaptation.options import add_material, settings_of
from benchmarks.adaptation.report import report
from benchmarks.adaptation.runs import plan, work
from benchmarks.common.options import add_compile, changes, check_positive, dispatch


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
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=" ".join(METHODS))
    add("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9], metavar="SHARE")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--lr", type=float, nargs="+", default=[2e-4], help="grid of peak learning rates, the same for every method")
    add("--set", action="append", default=[], metavar="[METHOD:]FIELD=VALUE", dest="fields", help="as often as needed")
    add("--tokens", type=int, default=5_800_000, help="of training a run (default: 5.8 million)")
    add("--seconds", type=float, help="of training a run, at most; a run cut short is marked")
    add("--session-seconds", type=float, help="start no run later than this")
    add_compile(command)
    add_material(command)
    add("--json", action="store_true", help="print which runs were done as JSON")


def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Train and measure; which runs were done, as text."""
    a = arguments
    for lr in a.lr:
        check_positive({"lr": lr})
    only = {"compile": a.compile, "seconds": a.seconds, "session_seconds": a.session_seconds}
    settings = settings_of(a, command_line, tokens=a.tokens, sparsities=a.sparsity, **only)
    fields = changes(a.fields, {method: METHODS[method].fields for method in a.methods})
    found = work(settings, plan(settings, fields, a.lr, a.seeds))
    if a.json:
        return json.dumps(found)
    return ", ".join(f"{len(names)} {kind}" for kind, names in found.items())


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    line = shlex.join(["python", "-m", "benchmarks.adaptation", *argv])
    commands = {
        "run": lambda arguments: print(run(arguments, line)),
        "report": lambda arguments: print(report(arguments.folder, as_json=arguments.json)),
    }
    return dispatch(commands, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
