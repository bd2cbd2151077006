"""The fields of ``SparsifyConfig`` as options of the command line, which names but does not check or document them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any


def number(text: str) -> int | float:
    """``"10"`` or ``"0.05"`` as the number that it is."""
    try:
        return int(text)
    except ValueError:
        return float(text)


_KINDS: dict[str, type | Callable[[str], Any]] = {
    "expert_size": int,
    "partition": str,
    "router": str,
    "router_norm": bool,
    "shared_experts": number,
    "rule": str,
    "gate": str,
    "gate_offset": float,
    "budget": str,
    "calibration_tokens": int,
    "seed": int,
}
_PREFIX = "set_"


def add_settings(command: argparse.ArgumentParser, what_for: str, *, leave_out: Collection[str] = ()) -> None:
    """Let ``command`` take every field but those left out; ``what_for`` ends the sentence that introduces them."""
    group = command.add_argument_group(
        "settings", f"fields of torch_prunepath.SparsifyConfig, which documents them{what_for}"
    )
    for name, kind in _KINDS.items():
        if name in leave_out:
            continue
        how: dict[str, Any] = {"type": kind, "metavar": kind.__name__}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"{_PREFIX}{name}", default=argparse.SUPPRESS, **how)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, by name."""
    return {name.removeprefix(_PREFIX): value for name, value in vars(arguments).items() if name.startswith(_PREFIX)}
