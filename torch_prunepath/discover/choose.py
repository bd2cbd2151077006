"""Choosing some of a model's feed-forward networks (FFNs), by name or by what they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch_prunepath.config import FFNSpec

Which = str | Callable[[FFNSpec], bool] | Iterable[str | Callable[[FFNSpec], bool]]
"""FFNs of a model: a pattern, a function of an :class:`FFNSpec`, or several of these, of which one must hold.

A pattern is one or more whole parts of a dotted name, with the wildcards of :mod:`fnmatch`: ``*``, ``?`` and ``[...]``,
where ``*`` stands for several parts too. It means every FFN with such parts anywhere in the name of one of its linear
layers. So ``"vision_tower"`` means all that lies inside any module of this name, ``"layers.0"`` what lies in the first
entry of a list (and not in ``layers.01``), ``"model.layers.0.mlp"`` one FFN, ``"layers.*.shared_expert"`` one for each
layer, and ``"*"`` all.
"""

_LISTED = 20
"""Names that an error lists one by one; of more, those that differ by an index are one. A guess at what is read."""


def choose(
    specs: Sequence[FFNSpec], refused: dict[str, str], include: Which | None, exclude: Which | None
) -> tuple[list[FFNSpec], list[FFNSpec]]:
    """Divide FFNs into those that are wanted and those that are not, both in their order.

    Args:
        specs: the FFNs of a model.
        refused: the reason why an FFN cannot be made sparse, by its name. An ``exclude`` that means such a module is
            no mistake.
        include: which to keep; None: all.
        exclude: which of these to leave out; None: none.

    Raises:
        TypeError: if ``include`` or ``exclude`` is of another type.
        ValueError: if a pattern means no FFN, or nothing is left.
    """
    wanted, unwanted = _tests("include", include), _tests("exclude", exclude)
    for name, tests in (("include", wanted), ("exclude", unwanted)):
        for test in tests or ():
            if isinstance(test, str) and not any(matches(test, spec) for spec in specs):
                _check_refused(name, test, specs, refused)
    kept = [
        spec for spec in specs if (wanted is None or _any(wanted, spec)) and not (unwanted and _any(unwanted, spec))
    ]
    if specs and not kept:
        given = " and ".join(
            f"{name}={_shown(which)}"
            for name, which in (("include", include), ("exclude", exclude))
            if which is not None
        )
        raise ValueError(f"{given} leaves no FFN to make sparse: there are {listed(spec.name for spec in specs)}")
    return kept, [spec for spec in specs if spec not in kept]


def matches(pattern: str, spec: FFNSpec) -> bool:
    """Whether a pattern means this FFN, by the rule of :data:`Which`."""
    parts = [part for part in (spec.gate, spec.up, spec.down) if part is not None]
    names = [".".join(filter(None, (spec.name, part))) for part in parts]
    return any(_in_name(pattern, name) for name in names)


def _in_name(pattern: str, name: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def listed(names: Iterable[str]) -> str:
    """Join names; of many, those that differ by an index only are one, with ``*`` for the index, and their number."""
    found = [name or "(the model)" for name in names]
    if len(found) <= _LISTED:
        return ", ".join(found)
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault(without_index(name), []).append(name)
    return ", ".join(all_[0] if len(all_) == 1 else f"{group} ({len(all_)})" for group, all_ in groups.items())


def without_index(name: str) -> str:
    """Return the name with ``*`` for every part that is a number."""
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


def _tests(name: str, which: Any) -> list[str | Callable[[FFNSpec], bool]] | None:
    """Return what ``which`` consists of, or None if it is None."""
    if which is None:
        return None
    tests = [which] if isinstance(which, str) or callable(which) else which
    good = isinstance(tests, Iterable) and not isinstance(tests, bytes | dict)
    tests = list(tests) if good else []
    if not good or not all(isinstance(test, str) or callable(test) for test in tests):
        raise TypeError(
            f"{name}={which!r} is no name, pattern or function of an FFNSpec, nor a list of these: write "
            f"{name}='vision_tower' or {name}=['model.layers.0.*', 'model.layers.1.*']"
        )
    return tests


def _any(tests: Sequence[str | Callable[[FFNSpec], bool]], spec: FFNSpec) -> bool:
    return any(matches(test, spec) if isinstance(test, str) else bool(test(spec)) for test in tests)


def _check_refused(name: str, pattern: str, specs: Sequence[FFNSpec], refused: dict[str, str]) -> None:
    """Raise ValueError for a pattern that means no FFN, unless it leaves out what is refused anyway."""
    found = {module: reason for module, reason in refused.items() if _in_name(pattern, f"{module}.x")}
    if found and name == "exclude":
        return
    names = listed(spec.name for spec in specs)
    if found:
        module, reason = next(iter(found.items()))
        raise ValueError(
            f"{name}={pattern!r} means no FFN that can be made sparse: {module} {reason}; there are {names}"
        )
    raise ValueError(f"{name}={pattern!r} means no FFN of this model: there are {names}")


def _shown(which: Any) -> str:
    return repr(getattr(which, "__name__", which))
