"""The command line: one subcommand an analysis."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType

from benchmarks.analyses import __doc__ as about
from benchmarks.analyses import ablations, initialisation, reconstruction, taus
from benchmarks.common.options import dispatch

ANALYSES: Mapping[str, ModuleType] = MappingProxyType(
    {module.NAME: module for module in (reconstruction, initialisation, ablations, taus)}
)
"""The analyses by name."""


def parser() -> argparse.ArgumentParser:
    """All subcommands."""
    top = argparse.ArgumentParser(
        prog="benchmarks.analyses", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, module in ANALYSES.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    line = shlex.join(["python", "-m", "benchmarks.analyses", *argv])

    def command(module: ModuleType) -> Callable[[argparse.Namespace], None]:
        def run(arguments: argparse.Namespace) -> None:
            text, encoded = module.work(arguments, line)
            print(encoded if arguments.json else text)

        return run

    return dispatch({name: command(module) for name, module in ANALYSES.items()}, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
