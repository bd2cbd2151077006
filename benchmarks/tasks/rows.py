"""What tasks with rows of text have in common: reading them, batches, calibration, the command line.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.harness import Options, Task
from benchmarks.harness.jobs import check_positive
from benchmarks.harness.options import add_methods, options_of
from benchmarks.harness.task import Row
from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.train.batches import IGNORED

Inputs = dict[str, Tensor]
CALIBRATION_BATCHES = 16
SUFFIXES = (".jsonl.gz", ".jsonl")
METHODS = ("dense", "dense-longer", "held", "ours", "static-norm", "moefication-mlp", "d2dmoe-held", "lte-held")
"""The methods that are run unless others are asked for."""


def read_rows(folder: Path, name: str) -> list[Row]:
    """The rows of ``NAME.jsonl.gz`` or ``NAME.jsonl``.

    Raises:
        UserError: if there is no such file, or it does not hold JSON lines.
    """
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            opener: Any = gzip.open if suffix.endswith(".gz") else open
            try:
                with opener(path, "rt", encoding="utf-8") as file:
                    return [json.loads(line) for line in file if line.strip()]
            except (OSError, EOFError, ValueError) as error:
                raise UserError(f"{path} holds no JSON lines ({one_line(error)}): get it again") from error
    raise UserError(f"there is no {name}.jsonl.gz (or .jsonl) in {folder}: name the folder that holds it with --data")


class Shuffled:
    """Batches of rows in a new order at each pass, padded to the longest of each batch.

    With ``one_shape``, for compiled training, they are the same batches, but padded to the longest row of all. Where
    the last batch of a pass is smaller, its rows are repeated without their labels until it is full: its loss on the
    task stays what it was, only what routers learn from and the realised sparsity count these rows again.

    Args:
        rows: tokenised, with ``labels``; each a dict of lists.
        batch: rows a batch.
        seed: of the orders.
        pad: padding value of each key.
        one_shape: see above.
    """

    def __init__(
        self, rows: Sequence[Row], batch: int, seed: int, pad: Mapping[str, int], one_shape: bool = False
    ) -> None:
        self.rows, self.batch, self.seed, self.pad = rows, batch, seed, pad
        self.width = max(len(row["input_ids"]) for row in rows) if one_shape else None
        self._passes = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __iter__(self) -> Iterator[Inputs]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed} {self._passes}").shuffle(order)
        self._passes += 1
        for start in range(0, len(order), self.batch):
            rows = [self.rows[i] for i in order[start : start + self.batch]]
            if self.width is not None:
                again = itertools.islice(itertools.cycle(rows), self.batch - len(rows))
                rows = rows + [_unlabelled(row) for row in again]
            yield padded(rows, self.pad, width=self.width)


def _unlabelled(row: Row) -> Row:
    labels = row["labels"]
    return {**row, "labels": IGNORED if isinstance(labels, int) else [IGNORED] * len(labels)}


def padded(rows: Sequence[Row], pad: Mapping[str, int], left: bool = False, width: int | None = None) -> Inputs:
    """Rows as one batch, int64 ``[B, T]``; numbers as ``[B]``; T is the longest row's length, or ``width``."""
    batch: Inputs = {}
    for key, first in rows[0].items():
        if isinstance(first, int):
            batch[key] = torch.tensor([row[key] for row in rows])
            continue
        length = max(len(row[key]) for row in rows) if width is None else width
        filled = [([pad[key]] * (length - len(row[key])), row[key]) for row in rows]
        batch[key] = torch.tensor([fill + row if left else row + fill for fill, row in filled])
    return batch


def on_device(batch: Inputs, device: str) -> Inputs:
    """The batch's tensors on the device."""
    return {key: value.to(device) for key, value in batch.items()}


def calibration_of(batches: Iterable[Inputs], device: str) -> list[dict[str, Any]]:
    """The first batches on the device, without labels."""
    some = itertools.islice(batches, CALIBRATION_BATCHES)
    return [{key: value for key, value in on_device(batch, device).items() if key != "labels"} for batch in some]


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """No words from transformers on loading a model: that a head is new is meant."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def add_task(command: argparse.ArgumentParser, task: type[Task], *, batch: int, lr: float) -> None:
    """The options that tasks with rows have in common."""
    add = command.add_argument
    add("--data", type=Path, required=True, help="folder of the data")
    add_methods(command, task, METHODS, [0.8, 0.9], lr)
    length = command.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps of the fine-tuning, and of each method after it")
    length.add_argument("--epochs", type=float, help="passes over the training data instead (default: 3)")
    text = "learning rates of the fine-tuning before; several compete on the selection half"
    add("--dense-lr", type=float, nargs="+", default=[lr], help=text)
    add("--batch", type=int, default=batch, help="rows a training batch")


def options_of_rows(arguments: argparse.Namespace, command_line: str) -> Options:
    """What the options of :func:`add_task` say, checked before anything heavy runs.

    Raises:
        UserError: if something is refused.
    """
    a = arguments
    check_positive({"batch": a.batch, "steps": a.steps, "epochs": a.epochs})
    if not Path(a.model).exists():
        raise UserError(f"there is no model {a.model}: name its folder with --model")
    if not a.data.is_dir():
        raise UserError(f"there is no folder {a.data}: name the folder of the data with --data")
    epochs = None if a.steps else a.epochs or 3.0
    return options_of(a, command_line, steps=a.steps, epochs=epochs, dense_lr=tuple(dict.fromkeys(a.dense_lr)))
