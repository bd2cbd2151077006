"""What is said of modules that are not made sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch_prunepath.discover.choose import without_index

_NAMED = 3
"""Modules with the same reason that a message names one by one; more become one name with ``*``. A guess."""


@dataclass(frozen=True)
class Refusal:
    """A module whose weights have the sizes of an FFN, and the reason why it is not taken as one."""

    name: str
    reason: str


def summary(refused: Sequence[Refusal]) -> str:
    """List the refusals, one line for each name and reason; indices of repeated layers become ``*``."""
    lines = Counter(f"{without_index(r.name) or '(the model)'}: {r.reason}" for r in refused)
    return "\n".join(f"  {line}" + (f" ({count} times)" if count > 1 else "") for line, count in lines.items())


def in_one_line(refused: Sequence[Refusal]) -> str:
    """Tell the refusals in one line, those with the same reason together."""
    groups: dict[str, list[str]] = {}
    for refusal in refused:
        groups.setdefault(refusal.reason, []).append(refusal.name or "(the model)")
    return "; ".join(f"{_names(names)} ({reason})" for reason, names in groups.items())


def _names(names: Sequence[str]) -> str:
    if len(names) <= _NAMED:
        return ", ".join(names)
    counts = Counter(map(without_index, names))
    one = {without_index(name): name for name in names}
    return ", ".join(one[name] if count == 1 else f"{count} at {name}" for name, count in counts.items())
