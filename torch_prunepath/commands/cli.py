"""The command line ``prunepath``: what it takes, and which job each command runs.

Nothing heavy is imported before a command is known, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

from torch_prunepath import __version__
from torch_prunepath.bench.options import DecodeOptions, FFNOptions
from torch_prunepath.commands.options import InfoOptions, QuickstartOptions, SparsifyOptions
from torch_prunepath.commands.sweep.options import SweepOptions
from torch_prunepath.commands.train.options import TrainOptions
from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.console.options import add_options, options_of

COMMANDS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "quickstart": (QuickstartOptions, "torch_prunepath.commands.quickstart"),
        "sparsify": (SparsifyOptions, "torch_prunepath.commands.sparsify"),
        "info": (InfoOptions, "torch_prunepath.commands.info"),
        "train": (TrainOptions, "torch_prunepath.commands.train.job"),
        "sweep": (SweepOptions, "torch_prunepath.commands.sweep.run"),
        "bench ffn": (FFNOptions, "torch_prunepath.bench.ffn"),
        "bench decode": (DecodeOptions, "torch_prunepath.bench.decode"),
    }
)
"""What each command takes, and the module that does its work: ``run(options, command_line)`` gives results ready for
JSON, and ``render(results)`` their text. The first line of the options' docstring is the command's summary."""

FAMILIES: Mapping[str, str] = MappingProxyType(
    {"bench": "Time dense against sparse, after checking that both compute the right thing."}
)
"""Commands of two words, by their first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    It is 0, 1 if a benchmark found wrong results, 2 if the person must mend something, or 130 if interrupted.
    """
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("prunepath: interrupted", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    command_line = shlex.join(["prunepath", *(sys.argv[1:] if argv is None else argv)])
    # So that a command that is asked to end still clears away what it has half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cls, module = COMMANDS[arguments.command]
    try:
        # Standard output is for the result alone, whatever a library prints.
        with contextlib.redirect_stdout(sys.stderr):
            options = options_of(cls, arguments)
            job = import_module(module)
            results = job.run(options, command_line)
    except ValueError as error:
        if arguments.debug:
            raise
        print(f"prunepath: error: {error if isinstance(error, UserError) else one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    _print(json.dumps(results, allow_nan=False) if arguments.json else job.render(results))
    return 0


def _print(text: str) -> None:
    """Print the result; whoever reads it may have had enough of it (``| head``)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prunepath", description="Sparse experts with a run-time sparsity knob for pretrained transformers."
    )
    parser.add_argument("--version", action="version", version=f"torch-prunepath {__version__}")
    places = {"": parser.add_subparsers(title="commands", required=True, metavar="COMMAND")}
    for command, (cls, _) in COMMANDS.items():
        family, _, name = command.rpartition(" ")
        if family not in places:
            summary = FAMILIES[family]
            group = places[""].add_parser(family, help=summary, description=summary)
            places[family] = group.add_subparsers(title="benchmarks", required=True, metavar="WHAT")
        summary = str(cls.__doc__).splitlines()[0]
        place = places[family].add_parser(name, help=summary, description=summary)
        place.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        place.add_argument("--debug", action="store_true", help="show the traceback of an error")
        place.set_defaults(command=command)
        add_options(place, cls)
    return parser
