"""Griffe extension for the API reference: sources are parsed, never imported, so the site builds without torch."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[2]
APART = "integrations"
"""The folder that is installed below torch_prunepath, but lies beside it."""

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^( *)Example::\n((?:\n|\1 +[^\n]*(?:\n|\Z))+)", re.MULTILINE)
"""The heading of an example, and all that is indented more than it."""


class Reference(griffe.Extension):
    """Puts ``integrations/`` where it is installed, below torch_prunepath, and turns docstrings into Markdown."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Parse the folder's modules into the package, then rewrite the docstrings of all that is in it."""
        if pkg.path == "torch_prunepath":
            folder = _parse(APART, ROOT / APART / "__init__.py", pkg, loader)
            for path in sorted((ROOT / APART).glob("[!_]*.py")):
                _parse(path.stem, path, folder, loader)
            _rewrite(pkg)


def _rewrite(thing: griffe.Object) -> None:
    if thing.docstring is not None:
        thing.docstring.value = markdown_of(thing.docstring.value)
    for member in thing.members.values():
        if isinstance(member, griffe.Object):  # what is imported from elsewhere is an alias
            _rewrite(member)


def markdown_of(docstring: str) -> str:
    """The docstring without what it has from reStructuredText: roles go, and examples become fenced blocks."""
    return EXAMPLE.sub(_fenced, ROLE.sub(r"`\1`", docstring))


def _fenced(example: re.Match[str]) -> str:
    return f"Example:\n\n```python\n{textwrap.dedent(example[2]).strip()}\n```\n\n"


def _parse(name: str, path: Path, parent: griffe.Module, loader: griffe.GriffeLoader) -> griffe.Module:
    module = griffe.visit(
        name,
        filepath=path,
        code=path.read_text(encoding="utf-8"),
        extensions=loader.extensions,
        parent=parent,
        docstring_parser=loader.docstring_parser,
        docstring_options=loader.docstring_options,
        lines_collection=loader.lines_collection,
        modules_collection=loader.modules_collection,
    )
    parent.set_member(name, module)
    return module
