"""A command's output folder: complete or not there at all, and never in place of what the command did not write."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from torch_prunepath.console.errors import UserError, write_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

REMEDY = "choose another place with --output"

_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""Words in the errors of torch.save that tell that a file could not be written."""

RESULTS = "results.json"
"""The file of an output folder that holds the results, by which a command knows its own folders again."""


@contextmanager
def output_folder(path: Path, *, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place once the block has ended without an error.

    Args:
        path: where the output goes in the end.
        ours: whether an existing folder is an earlier output of this command, which may be replaced.

    Raises:
        UserError: if ``path`` holds something else, or cannot be written.
    """
    path = path.absolute()
    missing = [parent for parent in path.parents if not parent.exists()]
    with writing(path):
        _check_free(path, ours)
        partial, lock = _new_partial(path)
    try:
        yield partial
        with writing(path):
            _check_free(path, ours)
            partial.chmod(0o777 & ~_umask())  # mkdtemp closes its folders to others
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
    finally:
        _remove(partial, lock)
        for parent in missing:  # made for nothing, if they are empty
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for what becomes that file; it is gone at the end, and after a kill at the next call.

    Raises:
        OSError: if it cannot be made.
    """
    partial, lock = _new_partial(path.absolute())
    try:
        yield partial
    finally:
        _remove(partial, lock)


def _remove(partial: Path, lock: int | None) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def remove_leftovers(path: Path) -> None:
    """Remove half-written folders of ``path`` whose process is gone; its name may hold ``*``.

    A process that is alive holds a lock on its folder, and the system gives the lock back however the process ends.
    """
    if fcntl is None:
        return
    for leftover in path.parent.glob(f".{path.name}.{'?' * 8}.partial"):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _new_partial(path: Path) -> tuple[Path, int | None]:
    """Make a folder beside ``path``, after removing leftovers; return it and its lock, where locks can be had."""
    remove_leftovers(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        if fcntl is None:
            return partial, None
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            os.close(lock)
            return partial, None
        if partial.exists():
            return partial, lock
        os.close(lock)  # another process took it for a leftover in between


def is_output_of(command: str) -> Callable[[Path], bool]:
    """Tells of a folder whether it holds the results of ``command``, or of a command that begins so."""

    def ours(folder: Path) -> bool:
        try:
            results = json.loads((folder / RESULTS).read_text())
        except (OSError, ValueError):
            return False
        return isinstance(results, dict) and f"{results.get('command')} ".startswith(f"{command} ")

    return ours


def say(line: str) -> None:
    """Tell the person who waits, on standard error and at once: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what fails while ``path`` is written into :class:`UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise write_error(error, path, REMEDY) from error
    except Exception as error:
        # tokenizers raises Exception itself, torch.save RuntimeError, with the system's error as text at most.
        if "os error" not in str(error) and not any(word in str(error) for word in _TORCH_WRITES):
            raise
        raise write_error(error, path, REMEDY) from error


def check_room(folder: Path, needed: int, path: Path) -> None:
    """Refuse early what would fail late.

    Args:
        folder: a folder that exists.
        needed: bytes that will be written there.
        path: what the message calls the folder.

    Raises:
        UserError: if the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        amounts = f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"
        raise UserError(f"no room on disk for {path}: {amounts}: free some, or {REMEDY}")


def _check_free(path: Path, ours: Callable[[Path], bool]) -> None:
    taken = path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))
    if taken and (path.is_symlink() or not path.is_dir() or not ours(path)):
        raise UserError(f"{path} exists and is not an earlier output of this command: remove it, or {REMEDY}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
