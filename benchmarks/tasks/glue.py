"""GLUE: accuracy against sparsity, a dense encoder fine-tuned on each task, then made sparse by each method.

    python -m benchmarks glue run --model DIR --data DIR --tasks rte mrpc --seeds 0 1 2 -o OUT
    python -m benchmarks glue report OUT --both-halves

DIR of the model is a folder in Hugging Face's layout (all-MiniLM-L6-v2, for instance), DIR of the data holds
``sst2_train.jsonl.gz``, ``sst2_dev.jsonl.gz`` and so on. Nothing is downloaded. Every method starts from the same
fine-tuned dense model and takes the same number of optimiser steps on the same data; ``dense-longer`` takes them and
stays dense. Dev sets are cut in two once and for all: learning rates and settings are chosen on one half, the other is
reported; with ``--both-halves`` the other way round as well. (The rate of the fine-tuning before is chosen once, by the
first half.)

Fine-tuned and converted models are kept in ``OUT/cache``, which may be removed, and shared by processes with the same
OUT. With ``--compile`` every method trains compiled, wherever it does not work by hooks, on the same batches padded to
one shape.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn

from benchmarks.harness import Trained, run
from benchmarks.harness.options import dispatch, outcome_said, run_and_report
from benchmarks.harness.scores import Halves, write_report
from benchmarks.harness.store import digest, digest_of_model, records_of
from benchmarks.harness.task import Row
from benchmarks.tasks.rows import (
    Shuffled,
    add_task,
    calibration_of,
    on_device,
    options_of_rows,
    padded,
    read_rows,
    unheard,
)
from torch_prunepath.baselines.routed import CALIBRATION_TOKENS
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.inputs.data import evaluating

NAME = "glue"
METRICS = ("accuracy", "f1")
PERCENT = {"accuracy": 100.0, "f1": 100.0}


@dataclass(frozen=True)
class Shape:
    """Where a task's data are.

    Attributes:
        texts: names of the fields with text.
        train: file to train on; None if only the dev file is at hand, three fifths of which are trained on then.
        dev: file with the held-out rows.
        f1: F1 of label 1 is reported as well.
        matthews: Matthews' correlation of two labels is reported as well.
    """

    texts: tuple[str, ...]
    train: str | None
    dev: str
    f1: bool = False
    matthews: bool = False


GLUE: Mapping[str, Shape] = MappingProxyType(
    {
        "sst2": Shape(("sentence",), "sst2_train", "sst2_dev"),
        "mrpc": Shape(("sentence1", "sentence2"), "mrpc_train", "mrpc_dev", f1=True),
        "rte": Shape(("sentence1", "sentence2"), "rte_train", "rte_dev"),
        "qnli": Shape(("question", "sentence"), None, "qnli_dev"),
    }
)
TRAINED_OF_DEV = 0.6


# --- data -------------------------------------------------------------------------------------------------------------


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


def matthews(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews' correlation of labels 0 and 1, in [-1, 1]; 0 if either is the same for all rows."""
    pairs = list(zip(predicted, labels, strict=True))
    right = sum(p == y == 1 for p, y in pairs) * len(pairs) - sum(predicted) * sum(labels)
    spread = math.prod(sum(values) * (len(pairs) - sum(values)) for values in (predicted, labels))
    return right / math.sqrt(spread) if spread else 0.0


# --- the task ---------------------------------------------------------------------------------------------------------


class GlueTask:
    """One GLUE task.

    Args:
        name: in :data:`GLUE`, unless ``shape`` is given.
        folder: of the data.
        model: folder of an encoder and its tokenizer.
        batch: rows a training batch.
        length: tokens a row, at most.
        device: where to run.
        shape: where the data are; None: as :data:`GLUE` says.

    Raises:
        UserError: if data or model cannot be had.
    """

    tuned, causal = True, False
    accumulation, step_tokens, calibration_tokens = 1, None, CALIBRATION_TOKENS
    packages: tuple[str, ...] = ()

    def __init__(
        self, name: str, folder: Path, model: str, *, batch: int, length: int, device: str, shape: Shape | None = None
    ) -> None:
        self.name, self.batch, self.length, self.device = name, batch, length, device
        self.place, self.model, self.weights = model, Path(model).name, digest_of_model(Path(model))
        self.shape = GLUE[name] if shape is None else shape
        parts = rows_of(self.shape, folder)
        self.about = {"data": digest([parts, length], 16), "batch": batch}
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

    def batches(self, seed: int, *, one_shape: bool = False, accumulation: int = 1, skip: int = 0) -> Shuffled:
        """Training batches with labels, in a new order at each pass."""
        return Shuffled(self.train, self.batch, seed, self.pad, one_shape)

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels."""
        return calibration_of(self.batches(0), self.device)

    def fresh(self, seed: int) -> nn.Module:
        """The encoder with a classification head drawn from the seed."""
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng(devices=[]), unheard(), as_user_error(OSError, ValueError):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                self.place, num_labels=self.labels, dtype=torch.float32
            )
        return model.to(self.device)  # type: ignore[no-any-return]

    def evaluate(self, trained: Trained, sparsity: Sequence[float]) -> list[Row]:
        """Accuracy, loss and, where it is the task's custom, F1 of both halves; chosen by accuracy, then by loss."""
        found = []
        for row in trained.settings(sparsity, self.calibration()):
            if "unreachable" not in row:
                row |= {"select": self._half(trained, self.select), "report": self._half(trained, self.report)}
                row["select"]["score"] = preference(row["select"])
            found.append(row)
        return found

    def _half(self, trained: Trained, rows: Sequence[Row]) -> dict[str, Any]:
        # Rows of like length together: less padding.
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        logits, labels = [], [row["labels"] for row in rows]
        with evaluating(trained.model), trained.knob.recording() as record:
            for start in range(0, len(rows), 4 * self.batch):
                batch = padded(rows[start : start + 4 * self.batch], self.pad)
                inputs = {key: value for key, value in on_device(batch, self.device).items() if key != "labels"}
                logits.append(trained.model(**inputs).logits.float().cpu())
        scores_BC = torch.cat(logits)
        predicted = scores_BC.argmax(-1).tolist()
        found = {
            "rows": len(rows),
            "accuracy": accuracy(predicted, labels),
            "loss": float(nnf.cross_entropy(scores_BC, torch.tensor(labels))),
        }
        if self.shape.f1:
            found["f1"] = f1(predicted, labels)
        if self.shape.matthews:
            found["matthews"] = matthews(predicted, labels)
        return {**found, "sparsity": record.sparsity}


# --- the command line -------------------------------------------------------------------------------------------------


def _add_run(command: argparse.ArgumentParser) -> None:
    add_task(command, GlueTask, batch=32, lr=1e-4)
    add = command.add_argument
    add("--tasks", nargs="+", default=list(GLUE), choices=list(GLUE), metavar="TASK", help=", ".join(GLUE))
    add("--length", type=int, default=128, help="tokens a row, at most")


def _add_report(command: argparse.ArgumentParser) -> None:
    words = "report both halves, each with the runs that the other prefers, in place of the report half alone"
    command.add_argument("--both-halves", action="store_true", help=words)


def _run(arguments: argparse.Namespace, command_line: str) -> str:
    options = options_of_rows(arguments, command_line)
    if arguments.length < 8:
        raise UserError(f"--length {arguments.length} leaves too little text: give at least 8")
    about = {"batch": arguments.batch, "length": arguments.length, "device": arguments.device}
    tasks = [GlueTask(name, arguments.data, arguments.model, **about) for name in dict.fromkeys(arguments.tasks)]
    return outcome_said(run(tasks, options), arguments.json)


def _report(arguments: argparse.Namespace, _: str) -> str:
    halves = Halves(preference, both=arguments.both_halves)
    results, text = write_report(arguments.place, records_of(arguments.place, list(GLUE)), METRICS, PERCENT, halves)
    return json.dumps(results) if arguments.json else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    parser = run_and_report(NAME, __doc__, _add_run, _add_report)
    return dispatch(NAME, parser, {"run": _run, "report": _report}, argv)
