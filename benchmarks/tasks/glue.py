"""GLUE tasks for an encoder with a classification head: data, the halves of their dev sets, accuracy and F1.

Dev sets are cut in two once and for all: one half is for choices (learning rates, settings), the other is reported.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from benchmarks.common.store import digest
from benchmarks.tasks.runs import measured, unheard
from torch_prunepath.console.errors import UserError, as_user_error, one_line
from torch_prunepath.train.batches import IGNORED

Row = dict[str, Any]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Where a task's data are.

    Attributes:
        texts: names of the fields with text.
        train: file to train on; None if only the dev file is at hand, three fifths of which are trained on then.
        dev: file with the held-out rows.
        f1: F1 of label 1 is reported as well.
    """

    texts: tuple[str, ...]
    train: str | None
    dev: str
    f1: bool = False


GLUE: Mapping[str, Shape] = MappingProxyType(
    {
        "sst2": Shape(("sentence",), "sst2_train", "sst2_dev"),
        "mrpc": Shape(("sentence1", "sentence2"), "mrpc_train", "mrpc_dev", f1=True),
        "rte": Shape(("sentence1", "sentence2"), "rte_train", "rte_dev"),
        "qnli": Shape(("question", "sentence"), None, "qnli_dev"),
    }
)
TRAINED_OF_DEV = 0.6
CALIBRATION_BATCHES = 16
SUFFIXES = (".jsonl.gz", ".jsonl")


# --- data -------------------------------------------------------------------------------------------------------------


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


def split(rows: Sequence[Row], texts: Sequence[str], trained: float = 0.0) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on (a share), to choose by, and to report: fixed, whatever the order of the rows.

    Equal texts stay together. The parts have the labels in equal shares, as far as numbers allow.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in texts), []).append(row)

    def place(key: tuple[Any, ...]) -> tuple[int, str]:
        return groups[key][0]["label"], hashlib.sha256("\x00".join(key).encode()).hexdigest()

    ordered = sorted(groups, key=place)
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for label in sorted({place(key)[0] for key in ordered}):
        same = [key for key in ordered if place(key)[0] == label]
        first = round(trained * len(same))
        for number, key in enumerate(same):
            parts[0 if number < first else 1 + (number - first) % 2].extend(groups[key])
    return parts


def rows_of(shape: Shape, folder: Path) -> tuple[list[Row], list[Row], list[Row]]:
    """A task's rows to train on, to choose by and to report.

    Raises:
        UserError: if a file is missing or has other fields.
    """
    dev = read_rows(folder, shape.dev)
    if shape.train is None:
        train, select, held = _checked(dev, shape, TRAINED_OF_DEV)
    else:
        train = read_rows(folder, shape.train)
        _checked(train, shape, 1.0)
        _, select, held = _checked(dev, shape, 0.0)
    if not (train and select and held):
        raise UserError(f"too few rows in {shape.dev} of {folder}: nothing is left for one of its parts")
    return train, select, held


def _checked(rows: list[Row], shape: Shape, trained: float) -> tuple[list[Row], list[Row], list[Row]]:
    for number, row in enumerate(rows, 1):
        missing = [name for name in (*shape.texts, "label") if name not in row]
        if missing:
            raise UserError(f"row {number} of {shape.dev} or {shape.train} has no {missing[0]!r}: get the data again")
    return split(rows, shape.texts, trained)


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


# --- metrics ----------------------------------------------------------------------------------------------------------


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Share that agree, in [0, 1]."""
    return sum(p == y for p, y in zip(predicted, labels, strict=True)) / len(labels)


def preference(half: Mapping[str, Any]) -> float:
    """What runs are chosen by: accuracy, and the lower loss of equals."""
    return float(half["accuracy"] - 1e-6 * min(half["loss"], 1e3))


def f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of label 1, in [0, 1]; 0 if nothing is predicted or labelled so."""
    both = sum(p == y == 1 for p, y in zip(predicted, labels, strict=True))
    total = sum(p == 1 for p in predicted) + sum(y == 1 for y in labels)
    return 2 * both / total if total else 0.0


# --- the task ---------------------------------------------------------------------------------------------------------


class GlueTask:
    """One task, for :class:`~benchmarks.tasks.runs.Runner`.

    Args:
        name: in :data:`GLUE`.
        folder: of the data.
        model: folder of an encoder and its tokenizer.
        batch: rows a training batch.
        length: tokens a row, at most.
        device: where to run.

    Raises:
        UserError: if data or model cannot be had.
    """

    packages: tuple[str, ...] = ()

    def __init__(self, name: str, folder: Path, model: str, *, batch: int, length: int, device: str) -> None:
        self.name, self.model, self.batch, self.length, self.device = name, model, batch, length, device
        self.shape = GLUE[name]
        parts = rows_of(self.shape, folder)
        self.digest = digest([parts, length], 16)
        self.labels = len({row["label"] for part in parts for row in part})
        with as_user_error(OSError, ValueError):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.pad = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
        self.train, self.select, self.report = (self._tokenised(part) for part in parts)

    def _tokenised(self, rows: Sequence[Row]) -> list[Row]:
        texts = [[row[name].strip() for row in rows] for name in self.shape.texts]
        found = self.tokenizer(*texts, truncation=True, max_length=self.length)
        keys = [key for key in found if key in self.pad]
        return [{key: found[key][i] for key in keys} | {"labels": row["label"]} for i, row in enumerate(rows)]

    def batches(self, seed: int, one_shape: bool = False) -> Shuffled:
        """Training batches with labels, in a new order at each pass."""
        return Shuffled(self.train, self.batch, seed, self.pad, one_shape)

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels."""
        some = itertools.islice(Shuffled(self.train, self.batch, 0, self.pad), CALIBRATION_BATCHES)
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in some]

    def fresh(self, seed: int) -> nn.Module:
        """The encoder with a classification head drawn from the seed."""
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng(devices=[]), unheard(), as_user_error(OSError, ValueError):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model, num_labels=self.labels, dtype=torch.float32
            )
        return model.to(self.device)  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, sparse: bool) -> dict[str, Any]:
        """Accuracy, loss and, where it is the task's custom, F1 of both halves; chosen by accuracy, then by loss."""
        found = {"select": self._half(model, self.select, sparse), "report": self._half(model, self.report, sparse)}
        select = found["select"]
        select["score"] = preference(select)
        return found

    def _half(self, model: nn.Module, rows: Sequence[Row], sparse: bool) -> dict[str, Any]:
        # Rows of like length together: less padding.
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        logits, labels = [], [row["labels"] for row in rows]
        with measured(model, sparse) as record:
            for start in range(0, len(rows), 4 * self.batch):
                batch = padded(rows[start : start + 4 * self.batch], self.pad)
                inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
                logits.append(model(**inputs).logits.float().cpu())
        scores_BC = torch.cat(logits)
        predicted = scores_BC.argmax(-1).tolist()
        found = {
            "rows": len(rows),
            "accuracy": accuracy(predicted, labels),
            "loss": float(nnf.cross_entropy(scores_BC, torch.tensor(labels))),
        }
        if self.shape.f1:
            found["f1"] = f1(predicted, labels)
        if record is not None:
            found["sparsity"] = record.sparsity
        return found
