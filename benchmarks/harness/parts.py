"""Parts of an experiment: what is done once, by one of several processes, and kept in one JSON file."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness.report import origin
from benchmarks.harness.store import FORMAT, Record, Store
from torch_prunepath.console.errors import as_user_error, one_line


@dataclass(frozen=True)
class Part:
    """What is done once.

    Attributes:
        name: of its file; ends with a digest of all that decides what it gives.
        about: begins its record.
        do: fills the record; a part that diverges raises ``FloatingPointError``, and its record holds no rows.
        packages: whose versions matter besides the usual ones.
    """

    name: str
    about: Mapping[str, Any]
    do: Callable[[Record], None]
    packages: tuple[str, ...] = ()


@dataclass
class Worker:
    """Does parts that are not done yet, one after the other.

    Attributes:
        store: where they are kept.
        command_line: for the record.
        commit: what results say they were made from; None: git's answer.
        session_seconds: no part starts later than this.
        outcome: names of parts that were ``done``, were done ``before``, are in hand ``elsewhere``, or were ``left``.
    """

    store: Store
    command_line: str
    commit: str | None = None
    session_seconds: float | None = None
    outcome: dict[str, list[str]] = field(
        default_factory=lambda: {k: [] for k in ("done", "before", "elsewhere", "left")}
    )
    begin: float = field(default_factory=time.monotonic)

    def do(self, part: Part, bar: tqdm[Any] | None = None, *, wait: bool = False) -> Record | None:
        """The part's record, now or before; None if it is in hand elsewhere (and not to be waited for), or was left.

        Raises:
            UserError: if a setting is refused, or a result cannot be written.
        """
        late = self.session_seconds is not None and time.monotonic() - self.begin > self.session_seconds
        if bar is not None:
            bar.set_postfix_str(part.name)
        with self.store.claim(part.name, wait=wait) as mine:
            known = self.store.has(part.name)
            kind = "before" if known else "elsewhere" if not mine else "left" if late else "done"
            if kind == "done":
                self.store.write(part.name, self._record(part))
                free()
        self.outcome[kind].append(part.name)
        if bar is not None:
            bar.update()
        return self.store.read(part.name)

    def _record(self, part: Part) -> Record:
        record: Record = {"format": FORMAT, **part.about, **origin(self.command_line, self.commit, part.packages)}
        record |= {"failed": None, "rows": []}
        start = time.perf_counter()
        try:
            with as_user_error(ValueError):
                part.do(record)
            check_finite(record["rows"])
        except FloatingPointError as error:
            record |= {"failed": one_line(error), "rows": []}
        return {**record, "seconds": round(time.perf_counter() - start, 2)}


def check_finite(value: Any, name: str = "a result") -> None:
    """Refuse numbers of rows that say nothing.

    Raises:
        FloatingPointError: if one is NaN or infinite.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_finite(each, str(key))
    elif isinstance(value, list):
        for each in value:
            check_finite(each, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value} after training: lower the learning rate")


def bar_of(total: int) -> tqdm[Any]:
    """A progress bar of parts; none where nobody looks."""
    return tqdm(total=total, unit="run", disable=None, file=sys.stderr)


def free() -> None:
    """Give memory back that other processes on the same device may need."""
    gc.collect()  # hooks and models hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
