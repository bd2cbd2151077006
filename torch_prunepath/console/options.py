"""A command's options, written once: a dataclass, from which its parser is made, and which is made of what was parsed.

Each field is an option: its name and default are the option's, its annotation is the type, and its part of the
``Attributes:`` section of the class's docstring is the help. What these cannot say, :func:`option` adds.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch_prunepath.console.errors import UserError

_KEY = "prunepath.option"

_LIMIT = 1 << 63
"""Whole numbers from here on do not fit into torch's."""


@dataclass(frozen=True)
class _Option:
    """What a field's own annotation and default cannot say; see :func:`option`."""

    flags: tuple[str, ...] = ()
    positional: bool = False
    group: str | None = None
    one_of: str | None = None
    required: bool = False
    settings: type | None = None
    leave_out: tuple[str, ...] = ()
    defaults: bool = True
    how: tuple[tuple[str, Any], ...] = ()


def option(
    *flags: str,
    default: Any = MISSING,
    positional: bool = False,
    group: str | None = None,
    one_of: str | None = None,
    required: bool = False,
    **how: Any,
) -> Any:
    """A field of a dataclass of options.

    Args:
        *flags: names on the command line, where they are not ``--`` and the field's name.
        default: the field's default; without one the option is required.
        positional: whether it has no name on the command line, only a place.
        group: title of the group that help lists it in.
        one_of: any name; of the options that share it, only one can be given.
        required: whether one of those that share ``one_of`` must be given.
        **how: passed on to ``add_argument``: ``metavar``, ``nargs``, ``const``, ``action``.
    """
    told = _Option(flags, positional, group, one_of, required, how=tuple(how.items()))
    return dataclasses.field(default=default, metadata={_KEY: told})


def settings(config: type, group: str, *, leave_out: Collection[str] = (), defaults: bool = True) -> Any:
    """A field that holds those fields of another dataclass that were given, by name: the others keep their defaults.

    Args:
        config: the dataclass.
        group: title of the group that help lists its fields in.
        leave_out: fields that are no options.
        defaults: whether help says the dataclass's defaults.
    """
    told = _Option(group=group, settings=config, leave_out=tuple(leave_out), defaults=defaults)
    return dataclasses.field(default_factory=dict, metadata={_KEY: told})


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Let ``parser`` take every field of a dataclass of options."""
    hints, helps = get_type_hints(cls), documented(cls)
    groups: dict[tuple[str | None, str | None], Any] = {(None, None): parser}
    for field in dataclasses.fields(cls):
        told = field.metadata.get(_KEY, _Option())
        if (told.group, None) not in groups:
            groups[told.group, None] = parser.add_argument_group(told.group)
        place = groups[told.group, None]
        if told.settings is not None:
            _add_settings(place, field.name, told.settings, told)
            continue
        if told.one_of is not None:
            if (told.group, told.one_of) not in groups:
                groups[told.group, told.one_of] = place.add_mutually_exclusive_group(required=told.required)
            place = groups[told.group, told.one_of]
        names, how = _argument(field, hints[field.name], told)
        place.add_argument(*names, help=_help(helps[field.name], field.default), **how)


def options_of(cls: type, arguments: argparse.Namespace) -> Any:
    """The dataclass of options with what was parsed, sequences as tuples.

    Raises:
        ValueError: if a number is not finite or too large for torch, or the dataclass refuses a value.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.metadata.get(_KEY, _Option()).settings is not None:
            start = f"{field.name}."
            given = {name.removeprefix(start): v for name, v in vars(arguments).items() if name.startswith(start)}
            for name, value in given.items():
                _check_number(flag(name), value)
            values[field.name] = given
        else:
            value = getattr(arguments, field.name)
            named = field.metadata.get(_KEY, _Option()).flags or (flag(field.name),)
            for each in value if isinstance(value, list) else [value]:
                _check_number(named[-1], each)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _check_number(name: str, value: Any) -> None:
    """Refuse numbers that no option takes, and that libraries refuse in words of their own, or not at all."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} {value} is no finite number: give another")
    if isinstance(value, int) and abs(value) >= _LIMIT:
        raise UserError(f"{name} {value} is out of range: torch takes whole numbers of 64 bits, below 2**63")


def documented(cls: type) -> dict[str, str]:
    """What the ``Attributes:`` sections of a class and of those before it say of each attribute, on one line each."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        section = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("\nAttributes:\n")[2]
        section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def flag(name: str) -> str:
    """The option of a field's name."""
    return f"--{name.replace('_', '-')}"


def number(text: str) -> int | float:
    """``"10"`` or ``"0.05"`` as the number that it is."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _argument(field: dataclasses.Field[Any], hint: Any, told: _Option) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What ``add_argument`` takes for a field, its help apart."""
    kind, several, choices = _kind(hint)
    names = told.flags or (flag(field.name),)
    how: dict[str, Any] = {"default": field.default}
    if kind is bool:
        how |= {"action": "store_true"}
    else:
        how |= {"type": kind} | (
            {"choices": choices} if choices else {"metavar": names[-1].strip("-").replace("-", "_").upper()}
        )
    if several:
        how |= {"nargs": "+"}
    how |= dict(told.how)
    if how.get("action") == "append":
        # A list of its own: argparse adds to what it finds.
        how |= {"nargs": None, "default": []}
    if told.positional:
        return (field.name,), {key: value for key, value in how.items() if key != "default"}
    if field.default is MISSING:
        how |= {"required": True, "default": None}
    return names, how | {"dest": field.name}


def _add_settings(group: Any, name: str, config: type, told: _Option) -> None:
    """The fields of ``config``, which checks their values itself; those that are not given are no attributes."""
    hints, helps = get_type_hints(config), documented(config)
    for field in dataclasses.fields(config):
        if field.name in told.leave_out:
            continue
        kind, _, choices = _kind(hints[field.name])
        metavar = "|".join(choices) if choices else kind.__name__
        how: dict[str, Any] = {"type": kind, "metavar": metavar}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = _help(helps[field.name], field.default if told.defaults else MISSING)
        group.add_argument(flag(field.name), dest=f"{name}.{field.name}", default=argparse.SUPPRESS, help=text, **how)


def _kind(hint: Any) -> tuple[Callable[[str], Any], bool, tuple[str, ...]]:
    """How an annotation's value is read from a word; whether it is a sequence of such; and its choices, if it has."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = tuple(each for each in get_args(hint) if each is not type(None))
        return (number, False, ()) if set(rest) == {int, float} else _kind(rest[0])
    if get_origin(hint) is Sequence:
        kind, _, choices = _kind(get_args(hint)[0])
        return kind, True, choices
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    assert hint in (bool, int, float, str, Path), hint
    return hint, False, ()


def _help(text: str, default: Any) -> str:
    """A docstring's words without its markup, and the default, unless the words say it or there is none to speak of."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "").rstrip(".")
    untold = default is MISSING or default is None or default is False or default == ()
    if "default" not in text and not untold:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    return text.replace("%", "%%")
