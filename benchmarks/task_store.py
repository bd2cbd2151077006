"""The folder of a task benchmark's results: one JSON file a run, written whole or not at all.

OUT/runs/TASK-METHOD-SPARSITY-seedN-HASH.json   what one run gave; the hash is of all that decides it
OUT/dense/TASK-dense-0-seedN-HASH.pt            fine-tuned dense weights, which the other runs start from
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_prunepath.errors import UserError, as_user_error, one_line

Run = dict[str, Any]


class Store:
    """The folder of results.

    Raises:
        UserError: if the folder holds something else, or cannot be made.
    """

    def __init__(self, output: Path, create: bool = True) -> None:
        self.output, self.runs, self.dense = output, output / "runs", output / "dense"
        if not create and not self.runs.is_dir():
            raise UserError(f"there are no runs in {output}: name the folder that -o named")
        if output.exists() and not self.runs.is_dir() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} holds something else: choose another folder with -o")
        if create:
            with as_user_error(OSError):
                self.runs.mkdir(parents=True, exist_ok=True)
                self.dense.mkdir(exist_ok=True)

    def read(self, name: str) -> Run | None:
        """A finished run.

        Raises:
            UserError: if its file is damaged.
        """
        path = self.runs / f"{name}.json"
        if not path.exists():
            return None
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): remove it, and run again") from error
        return run  # type: ignore[no-any-return]

    def write(self, name: str, run: Run) -> None:
        """Keep a run: completely, or not at all."""
        path = self.runs / f"{name}.json"
        with replacing(path) as part:
            part.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def all(self) -> dict[str, Run]:
        """Every finished run by name."""
        names = sorted(path.stem for path in self.runs.glob("*.json"))
        return {name: run for name in names if (run := self.read(name)) is not None}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once the block has ended without an error.

    Raises:
        UserError: if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with as_user_error(OSError):
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def digest_of(value: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_model(place: Path) -> str:
    """Of a model's file, or of the files right inside its folder; whatever they are called by."""
    paths = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest_of(found)
