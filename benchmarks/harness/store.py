"""A folder of results: one JSON file a job, and what several jobs use; each written whole or not at all.

OUT/runs/NAME.json                  what one job gave; the name ends with a digest of all that decides it
OUT/cache/NAME.lock                 held by the process that has the job in hand
OUT/cache/KIND-HASH.safetensors     tensors that were made once for several jobs, and what there is to say of them
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from benchmarks.harness.earlier import FORMAT, upgraded
from benchmarks.harness.kept import load_tensors, save_tensors
from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.console.output import writing

Record = dict[str, Any]
"""What one job gave, ready for JSON."""


def digest(value: Any, digits: int = 10) -> str:
    """Hex digits that differ where the JSON does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def digest_of_model(place: Path) -> str:
    """Digest of a model's file, or of the files right inside its folder; whatever they are called by."""
    paths = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(found, 16)


def digest_of_weights(model: nn.Module) -> str:
    """Digest of everything that a checkpoint of the model would hold, by name; the same on every device."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


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
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class Cache:
    """What was made once, in a folder; processes that share it wait for each other. Its files hold no code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensors(
        self, kind: str, key: Any, make: Callable[[], tuple[Mapping[str, Tensor], Any]]
    ) -> tuple[Mapping[str, Tensor], Any, bool]:
        """Tensors and what is said of them, from the folder if they were made before with this key.

        Args:
            kind: begins the file's name.
            key: everything that decides them, ready for JSON.
            make: tensors by name, and something else that JSON can hold.

        Returns:
            What ``make`` gives, tensors on the CPU if they come from the folder, and whether they do.

        Raises:
            UserError: if the file is damaged, or cannot be written.
        """
        path = self.folder / f"{kind}-{digest(key)}.safetensors"
        with locked(path.with_suffix(".lock"), wait=True):
            if path.exists():
                return *load_tensors(path), True
            tensors, said = make()
            with replacing(path) as part:
                save_tensors(part, tensors, said)
        return tensors, said, False

    def place(self, kind: str, key: Any, make: Callable[[Path], None]) -> Path:
        """A folder that ``make`` filled, now or before with this key.

        Raises:
            UserError: if it cannot be written.
        """
        path = self.folder / f"{kind}-{digest(key)}"
        with locked(path.with_suffix(".lock"), wait=True):
            if not path.exists():
                part = path.with_name(f".{path.name}.{os.getpid()}.partial")
                try:
                    with writing(path):
                        make(part)
                        part.rename(path)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
        return path


class Store:
    """The folder of results.

    Args:
        output: its path; made when something is written.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.runs, self.cache = output, output / "runs", Cache(output / "cache")

    def check_free(self) -> None:
        """Refuse a folder that holds something else than results of this version.

        Raises:
            UserError: if it does.
        """
        ours = self.runs.is_dir() or self.cache.folder.is_dir()
        if self.output.exists() and not ours and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UserError(f"{self.output} holds something else: choose another folder with -o")
        old = [name for name in self.names() if self._read(name).get("format") != FORMAT]
        if old:
            raise UserError(
                f"{self.output} holds runs of another version ({old[0]}), where methods had other names: `report` "
                "reads them, but new runs need another folder: choose one with -o"
            )

    def has(self, name: str) -> bool:
        """Whether the job is done."""
        return self._path(name).exists()

    def names(self) -> list[str]:
        """Names of all jobs that are done."""
        return sorted(path.stem for path in self.runs.glob("[!.]*.json"))

    def read(self, name: str) -> Record | None:
        """What a job gave, under today's names, if it is done.

        Raises:
            UserError: if its file is damaged.
        """
        return upgraded(self._read(name)) if self.has(name) else None

    def _read(self, name: str) -> Record:
        return read_json(self._path(name))

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep what a job gave.

        Raises:
            UserError: if it cannot be written.
        """
        text = json.dumps(record, allow_nan=False) + "\n"
        with replacing(self._path(name)) as part:
            part.write_text(text, encoding="utf-8")

    def claim(self, name: str, *, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        """Take a job in hand while the context lasts; whether that worked, if another process is not waited for."""
        return locked(self.cache.folder / f"{name}.lock", wait=wait)

    def _path(self, name: str) -> Path:
        return self.runs / f"{name}.json"


def read_json(path: Path) -> Record:
    """The object in a file.

    Raises:
        UserError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): remove it, and run again") from error
    return found  # type: ignore[no-any-return]


def records_of(place: Path, tasks: Collection[str] | None = None) -> dict[str, Record]:
    """Every record of a folder of results, or of a file that holds a list of them as ``runs``, under today's names.

    Args:
        place: the folder or file.
        tasks: only records of jobs on these tasks; None: all.

    Raises:
        UserError: if there is none, or one is damaged.
    """
    if place.is_file():
        found = read_json(place).get("runs") or []
        records = {f"{place.stem}-{number}": upgraded(record) for number, record in enumerate(found)}
    else:
        store = Store(place)
        records = {name: record for name in store.names() if (record := store.read(name)) is not None}
    if tasks is not None:
        records = {name: record for name, record in records.items() if record.get("job", {}).get("task") in tasks}
    if not records:
        of = "" if tasks is None else f" of {', '.join(tasks)}"
        raise UserError(f"there is no result{of} in {place}: name the folder that -o of run named")
    return records
