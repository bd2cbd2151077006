"""``python -m benchmarks NAME ...``: the one way to start any experiment or measurement.

Without a name it lists them; ``python -m benchmarks NAME --help`` says what one takes.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType


def _file_of(module: str) -> Path:
    return Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")


COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "books": "tasks.books",
        "glue": "tasks.glue",
        "e2e": "tasks.e2e",
        "reconstruction": "analyses.reconstruction",
        "initialisation": "analyses.initialisation",
        "ablations": "analyses.ablations",
        "taus": "analyses.taus",
        **{f"figure{number}": f"presets.figure{number}" for number in (2, 3, 4, 5, 7, 8, 9)},
        "quality": "quality",
        "partition": "partition",
        "kernels": "kernels",
        "cpu_rows": "cpu_rows",
        "training": "training",
        "distillation": "distillation",
        "pictures": "pictures",
    }
)
"""Module of each command inside this package; it has ``main(argv) -> exit code``."""


def summary(module: str) -> str:
    """The first line of a module's docstring; the module is not imported, since some need a GPU's packages."""
    about = ast.get_docstring(ast.parse(_file_of(module).read_text(encoding="utf-8"))) or ""
    return about.splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code, 2 if there is no such command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("\n".join([str(__doc__), *(f"  {name:{width}}  {summary(COMMANDS[name])}" for name in COMMANDS)]))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: there is no benchmark {name!r}: choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    found: int = importlib.import_module(f"benchmarks.{COMMANDS[name]}").main(rest)
    return found


if __name__ == "__main__":
    sys.exit(main())
