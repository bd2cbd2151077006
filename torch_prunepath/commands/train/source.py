"""What ``prunepath train`` reads: a text file or a data set, as batches of token windows.

Shapes: N windows of C tokens.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.evaluation.corpus import text_file, windows

MOST = 1 << 62
"""More windows than any text has."""


@dataclass(frozen=True)
class Source:
    """Where text comes from: a UTF-8 file, or a data set of the ``datasets`` package.

    Attributes:
        text: the file.
        dataset: name or path of the data set.
        subset: the data set's configuration, if it has several.
        split: which of its splits.
        column: its column that holds text.
    """

    text: str | None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"

    @property
    def name(self) -> str:
        """What reports call it."""
        if self.dataset is None:
            return str(self.text)
        return " ".join(part for part in (self.dataset, self.subset, self.split) if part)

    def check(self) -> None:
        """Refuse early what would fail late.

        Raises:
            UserError: if there is no text, more than one, or nothing to read a data set with.
        """
        if (self.text is None) == (self.dataset is None):
            raise UserError("there is nothing to train on: give --text FILE or --dataset NAME, and not both")
        if self.dataset is not None and importlib.util.find_spec("datasets") is None:
            raise UserError("--dataset needs the package datasets: pip install 'torch-prunepath[train]', or use --text")
        if self.text is not None and not Path(self.text).is_file():
            text_file(Path(self.text))

    def read(self) -> str:
        """The text; documents of a data set with an empty line between them.

        Raises:
            UserError: if it cannot be had.
        """
        if self.dataset is None:
            corpus = text_file(Path(str(self.text)))
            return corpus.calibration + corpus.held_out
        return "\n\n".join(self._documents())

    def _documents(self) -> list[str]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            data = load_dataset(self.dataset, self.subset, split=self.split)
        except (OSError, ValueError, DatasetsError) as error:
            raise UserError(
                f"cannot load the data set {self.name!r} ({one_line(error)}): check its name, --subset and --split and "
                "the network, or save its text to a file and give --text"
            ) from error
        if self.column not in data.column_names:
            raise UserError(
                f"{self.name!r} has no column {self.column!r}: choose with --text-column from "
                + ", ".join(data.column_names)
            )
        documents = data[self.column]
        if not all(isinstance(document, str) for document in documents):
            raise UserError(f"the column {self.column!r} of {self.name!r} holds other things than text: name another")
        return list(documents)


def train_windows(text: str, tokenizer: Any, context: int) -> Tensor:
    """All windows of a text, int64 ``[N, C]``.

    Raises:
        UserError: if it does not fill one.
    """
    return windows(text, tokenizer, context=context, count=MOST, part="text to train on")
