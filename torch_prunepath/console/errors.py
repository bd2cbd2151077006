"""Errors that a person at the command line can mend: one line, which names the remedy."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 400
"""Characters of a message that are shown: what libraries raise may hold a whole file."""


class UserError(ValueError):
    """What the person who ran a command can mend. The message is one line and says how."""


def one_line(error: BaseException | str) -> str:
    """The message with its white space collapsed, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


@contextmanager
def as_user_error(*types: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these types, raised where the library refuses what it was asked, into :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except types as error:
        raise UserError(one_line(error)) from error


def _is_full(place: Path) -> bool:
    """Whether the disk has no room for a block: torch.save does not pass the system's error on."""
    there = next((folder for folder in (place, *place.parents) if folder.exists()), None)
    try:
        return there is not None and shutil.disk_usage(there).free < 4096
    except OSError:
        return False


def write_error(error: Exception, place: Path, remedy: str) -> UserError:
    """What to tell when writing below ``place`` failed. Libraries in Rust pass the system's error on as text only."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else _is_full(place)
    if full or "os error 28" in str(error) or "No space left" in str(error):
        return UserError(f"no room on disk for {place}: free some, or {remedy}")
    return UserError(f"cannot write {place}: {one_line(error)}: {remedy}")
