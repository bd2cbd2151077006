"""A folder of results: one JSON file a run, and what several runs use; each written whole or not at all.

OUT/runs/NAME.json        what one run gave; the name ends with a digest of all that decides it
OUT/cache/NAME.lock       held by the process that has the run in hand
OUT/cache/KIND-HASH.pt    what was made once for several runs
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.console.output import writing

Run = dict[str, Any]


def digest(value: Any, digits: int = 10) -> str:
    """Hex digits that differ where the JSON does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def digest_of_model(place: Path) -> str:
    """Of a model's file, or of the files right inside its folder; whatever they are called by."""
    paths = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(found, 16)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path``, whose folder is made, that takes its place once the block has ended without an error.

    Raises:
        UserError: if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that ends with the process; without ``wait``, yields whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Cache:
    """What was made once, in a folder; processes that share it wait for each other. Its files are pickles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, key: Any, make: Callable[[], Any]) -> tuple[Any, bool]:
        """What ``make`` returns, from the folder if it was made before with this key; and whether it was.

        Raises:
            UserError: if the file is damaged, or cannot be written.
        """
        path = self.folder / f"{name}-{digest(key)}.pt"
        with locked(path.with_suffix(".lock"), wait=True):
            if path.exists():
                return load(path, weights_only=False), True
            made = make()
            with replacing(path) as part:
                torch.save(made, part)
        return made, False


def load(path: Path, *, weights_only: bool) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be loaded ({one_line(error)}): remove it, and run again") from error


class Store:
    """The folder of results.

    Args:
        output: its path; made when something is written.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.runs, self.cache = output, output / "runs", Cache(output / "cache")

    def check_free(self) -> None:
        """Refuse a folder that holds something else than results.

        Raises:
            UserError: with a remedy.
        """
        ours = self.runs.is_dir() or self.cache.folder.is_dir()
        if self.output.exists() and not ours and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UserError(f"{self.output} holds something else: choose another folder with -o")

    def has(self, name: str) -> bool:
        """Whether the run is done."""
        return self._path(name).exists()

    def read(self, name: str) -> Run | None:
        """A run, if it is done.

        Raises:
            UserError: if its file is damaged.
        """
        if not self.has(name):
            return None
        try:
            run = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{self._path(name)} cannot be read ({one_line(error)}): remove it, and run again"
            raise UserError(message) from error
        return run  # type: ignore[no-any-return]

    def write(self, name: str, run: Mapping[str, Any]) -> None:
        """Keep a run.

        Raises:
            UserError: if it cannot be written.
        """
        text = json.dumps(run, allow_nan=False) + "\n"
        with replacing(self._path(name)) as part:
            part.write_text(text, encoding="utf-8")

    def all(self) -> dict[str, Run]:
        """Every run that is done, by name.

        Raises:
            UserError: if there is none, or one is damaged.
        """
        names = sorted(path.stem for path in self.runs.glob("[!.]*.json"))
        if not names:
            raise UserError(f"there is no result in {self.output}: name the folder that -o of run named")
        return {name: run for name in names if (run := self.read(name)) is not None}

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Take a run in hand while the context lasts, unless another process has it; whether that worked."""
        return locked(self.cache.folder / f"{name}.lock", wait=False)

    def _path(self, name: str) -> Path:
        return self.runs / f"{name}.json"
