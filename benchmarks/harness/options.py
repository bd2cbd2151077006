"""What every experiment's command line has: methods, settings, lengths, where to run, and the way to a command."""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.jobs import Options, check_settings
from benchmarks.harness.methods import METHODS
from benchmarks.harness.task import Task
from torch_prunepath.console.errors import UserError


def changes(given: Sequence[str], known: Mapping[str, Collection[str]]) -> dict[str, dict[str, Any]]:
    """``--set`` by method.

    Args:
        given: ``FIELD=VALUE`` for every method that has the field, ``METHOD:FIELD=VALUE`` or ``METHOD.FIELD=VALUE`` for
            one. Values are Python's literals, or else words.
        known: the fields of each method that was chosen.

    Raises:
        UserError: if no method has such a field.
    """
    found: dict[str, dict[str, Any]] = {method: {} for method in known}
    for text in given:
        place, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text} says no value: write --set {text}=VALUE")
        method, separator, name = place.replace(":", ".").rpartition(".")
        name = name.replace("-", "_")
        if separator and method not in known:
            raise UserError(f"--set {text}: {method!r} is not among --methods {' '.join(known)}")
        asked = [method] if separator else list(known)
        having = [each for each in asked if name in known[each]]
        if not having:
            fields = sorted({field for each in asked for field in known[each]})
            raise UserError(f"--set {text}: no method has {name}: choose from {', '.join(fields) or 'nothing'}")
        for each in having:
            found[each][name] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """A number, None, True, a list and so on, or else a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def settings_of(given: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``--set`` for methods of the harness, each method once.

    Raises:
        UserError: as :func:`changes`.
    """
    return changes(given, {method: METHODS[method].fields for method in methods})


def add_methods(
    command: argparse.ArgumentParser, task: type[Task], default: Sequence[str], sparsity: Sequence[float], lr: float
) -> None:
    """Options of every command that compares methods on a task."""
    add = command.add_argument
    names = [name for name, method in METHODS.items() if method.fits(task)]
    add("--methods", nargs="+", default=list(default), choices=names, metavar="METHOD", help=", ".join(names))
    add(
        "--sparsity", type=float, nargs="+", default=list(sparsity), metavar="SHARE", help="of FFN neurons to leave out"
    )
    add("--lr", type=float, nargs="+", default=[lr], help=f"peak learning rates, which compete (default: {lr:g})")
    add("--seconds", type=float, help="of training a run, at most; a run cut short is marked")
    add("--session-seconds", type=float, help="start no run later than this")
    add("--quiet", action="store_true", help="no progress bars of single runs")
    add_training(command)


def add_training(command: argparse.ArgumentParser) -> None:
    """Options of every command that trains."""
    add = command.add_argument
    add("--model", required=True, help="folder, GGUF file or hub name of a dense model")
    add("-o", "--output", type=Path, required=True, help="folder of results; runs that it holds are not done again")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--set", action="append", default=[], metavar="[METHOD:]FIELD=VALUE", dest="fields", help="as often as needed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="train in bfloat16 autocast; weights and evaluation stay in float32")
    text = "train compiled, in this mode of torch.compile (default: default); the same for every method"
    add("--compile", nargs="?", const="default", metavar="HOW", help=text)
    add("--commit", help="what results say they were made from (default: git's answer)")
    add("--json", action="store_true", help="print one JSON object")


def options_of(arguments: argparse.Namespace, command_line: str, **more: Any) -> Options:
    """What the options of :func:`add_methods` say.

    Args:
        arguments: parsed.
        command_line: for the record.
        **more: further fields of :class:`Options`.

    Raises:
        UserError: if something is refused.
    """
    a = arguments
    check_device(a.device)
    same = {
        name: getattr(a, name) for name in ("output", "sparsity", "compile", "seconds", "session_seconds", "commit")
    }
    options = Options(
        methods=settings_of(a.fields, list(dict.fromkeys(a.methods))),
        lr=tuple(dict.fromkeys(a.lr)),
        seeds=tuple(dict.fromkeys(a.seeds)),
        autocast=a.bf16,
        command_line=command_line,
        progress=not (a.quiet or a.json),
        **same,
        **more,
    )
    check_settings(options)
    return options


def check_device(name: str) -> None:
    """Refuse ``--device`` where there is none such.

    Raises:
        UserError: if it is not there.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; torch built without CUDA
        raise UserError(f"--device {name}: this machine has none: leave it out, or give cpu") from error
    torch.backends.cuda.matmul.allow_tf32 = False


def outcome_said(outcome: Mapping[str, Sequence[str]], as_json: bool) -> str:
    """Which runs were done, as text."""
    return json.dumps(outcome) if as_json else ", ".join(f"{len(names)} {kind}" for kind, names in outcome.items())


Command = Callable[[argparse.Namespace, str], str]
"""Does what was asked, and answers what to print; gets the command line for the record."""


def parser_of(name: str, about: str | None) -> argparse.ArgumentParser:
    """An empty command line of ``python -m benchmarks NAME``."""
    return argparse.ArgumentParser(
        prog=f"benchmarks {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_and_report(
    name: str,
    about: str | None,
    add_run: Callable[[argparse.ArgumentParser], None],
    add_report: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.ArgumentParser:
    """The command line of an experiment with the commands ``run`` and ``report``."""
    top = parser_of(name, about)
    commands = top.add_subparsers(dest="command", required=True)
    add_run(commands.add_parser("run", help="do the runs that are not done yet", allow_abbrev=False))
    report = commands.add_parser("report", help="tables and a plot of what has been measured", allow_abbrev=False)
    report.add_argument("place", type=Path, help="the folder that -o of run named, or a file that holds runs")
    report.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    if add_report is not None:
        add_report(report)
    return top


def dispatch(
    name: str, parser: argparse.ArgumentParser, commands: Mapping[str, Command], argv: Sequence[str] | None
) -> int:
    """Run the command that was asked for and print its answer; the exit code, 2 if the person must mend something."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(argv)
    try:
        print(
            commands[getattr(arguments, "command", "run")](
                arguments, shlex.join(["python", "-m", "benchmarks", name, *argv])
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
