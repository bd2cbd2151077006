"""What the benchmarks' command lines have in common: ``--set``, devices, positive numbers, the way to a command."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

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


def add_compile(command: argparse.ArgumentParser) -> None:
    """Whether and how training is compiled."""
    text = "train compiled, in this mode of torch.compile (default: default); the same for every method"
    command.add_argument("--compile", nargs="?", const="default", metavar="HOW", help=text)


def check_device(name: str) -> None:
    """Refuse ``--device`` where there is none such.

    Raises:
        UserError: with a remedy.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; torch built without CUDA
        raise UserError(f"--device {name}: this machine has none: leave it out, or give cpu") from error


def check_positive(values: Mapping[str, float | None]) -> None:
    """Refuse numbers that are not positive; None is not given.

    Raises:
        UserError: with the option that gave it.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive")


def check_shares(values: Sequence[float]) -> None:
    """Refuse sparsities outside (0, 1).

    Raises:
        UserError: with a remedy.
    """
    for value in values:
        if not 0.0 < value < 1.0:
            raise UserError(f"--sparsity {value} is outside (0, 1): 0.8 leaves a fifth of the neurons")


def dispatch(commands: Mapping[str, Callable[[argparse.Namespace], None]], arguments: argparse.Namespace) -> int:
    """Run the command that was asked for; the exit code, 2 if the person must mend something."""
    try:
        commands[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
