"""What ``prunepath train`` keeps of a run that has not ended: its latest state, in a folder beside the output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.console.output import output_folder, remove_leftovers, writing
from torch_prunepath.train.state import Record, TrainState


@dataclass
class Kept:
    """What a saved state holds besides weights and :class:`TrainState`.

    Attributes:
        data: fingerprint of the batches.
        dtype: that the checkpoint's weights will have, without ``torch.``.
        distil: weight of the distillation.
        rows: what was measured before training.
        history: records of the steps so far.
        skipped: FFNs that were not made sparse, and why.
    """

    data: str
    dtype: str
    distil: float
    rows: list[dict[str, Any]]
    history: list[Record]
    skipped: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Kept:
        """What a saved state's folder holds; what only earlier versions kept is left out."""
        held = json.loads((folder / "session.json").read_text(encoding="utf-8"))
        return cls(**{each.name: held[each.name] for each in fields(cls) if each.name in held})


@contextmanager
def undamaged(saved: Path) -> Iterator[None]:
    """Say of a saved state that cannot be read that it is damaged.

    Raises:
        UserError: in place of whatever was raised.
    """
    try:
        yield
    except Exception as error:  # of any type: a damaged file fails where its reader stumbles
        raise UserError(
            f"the unfinished run in {saved.parent} is damaged ({one_line(error)}): remove it, and start anew"
        ) from error


class Unfinished:
    """Saved states of a run that has not ended, in ``OUTPUT.training`` beside its output."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(output.name + ".training")

    def check(self, resume: bool) -> None:
        """Refuse to overwrite a run, or to resume none.

        Raises:
            UserError: if there is no unfinished run to resume, or one that was not asked for.
        """
        if resume and self.latest() is None:
            raise UserError(f"there is no unfinished run in {self.folder}: leave --resume out")
        if self.folder.is_dir():
            remove_leftovers(self.folder / "step-*")
        if not resume and self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise UserError(f"{self.folder} holds an unfinished run: go on with --resume, or remove it")

    def latest(self) -> Path | None:
        """The folder of the latest state."""
        folders = [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        steps = {int(path.name.removeprefix("step-")): path for path in folders}
        return steps[max(steps)] if steps else None

    def save(self, model: Any, tokenizer: Any, kept: Kept, state: TrainState) -> None:
        """Save a state; the one before goes once it is complete."""
        path = self.folder / f"step-{state.step}"
        with output_folder(path, ours=lambda _: True) as folder, writing(path):
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            torch.save(state.state_dict(), folder / "state.pt")
            (folder / "session.json").write_text(json.dumps(asdict(kept)), encoding="utf-8")
        for other in self.folder.glob("step-*"):
            if other != path:
                shutil.rmtree(other)

    def remove(self) -> None:
        """The run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
