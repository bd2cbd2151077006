"""What ``python -m benchmarks.adaptation run`` was asked."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_prunepath.errors import UserError

DATA_FILES = {"train": "books_train.txt.xz", "books": "books_test.txt.xz", "wikitext2": "wikitext2_test.raw.txt.gz"}
"""What ``--data`` is expected to hold."""
VALID = "valid"
"""The text that learning rates are chosen on: the end of the training text, which no run trains on."""


@dataclass(frozen=True)
class Budget:
    """What each run trains on.

    Attributes:
        tokens: asked for; a run takes as many whole steps as fit.
        context: C.
        batch_tokens: tokens a step.
        accumulation: batches a step.
    """

    tokens: int
    context: int
    batch_tokens: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
        if self.context < 2:
            raise UserError("--context 1 leaves nothing to predict: give at least 2")
        if self.batch_tokens % (self.context * self.accumulation):
            raise UserError(
                f"--batch-tokens {self.batch_tokens} is no multiple of --context times --accumulation, "
                f"{self.context * self.accumulation}: steps would differ in size"
            )
        if self.tokens < self.batch_tokens:
            raise UserError(f"--tokens {self.tokens} is less than a step of {self.batch_tokens}: give more")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Windows a batch."""
        return self.batch_tokens // (self.context * self.accumulation)


@dataclass(frozen=True)
class Settings:
    """What belongs to the measurement rather than to one run.

    Attributes:
        model: folder, GGUF file or hub name of a causal language model.
        train_text: file.
        test_texts: file by name.
        output: the folder of the results.
        budget: of each run.
        sparsities: that perplexity is measured at.
        device: where to run.
        bf16: train in bfloat16 autocast; perplexity is measured in float32.
        compile: compile what lies outside the FFNs; the same for every method.
        windows: of each text that perplexity is measured on, at most.
        search_windows: of these, on which tau is searched.
        eval_rows: windows that go through the model at once.
        calibration_tokens: that experts, routers and scores are made from.
        seconds: of training a run, at most; a run that is cut short says so.
        session_seconds: no run starts later than this after the command.
        commit: what results say they were made from.
        command_line: for the record.
    """

    model: str
    train_text: Path
    test_texts: Mapping[str, Path]
    output: Path
    budget: Budget
    sparsities: tuple[float, ...]
    device: str
    bf16: bool
    compile: bool
    windows: int
    search_windows: int
    eval_rows: int
    calibration_tokens: int
    seconds: float | None
    session_seconds: float | None
    commit: str | None
    command_line: str

    def __post_init__(self) -> None:
        for share in self.sparsities:
            if not 0.0 < share < 1.0:
                raise UserError(f"--sparsity {share} is outside (0, 1): 0.8 leaves a fifth of the neurons")
        for name in ("windows", "search_windows", "eval_rows", "calibration_tokens", "seconds", "session_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
        for path in (self.train_text, *self.test_texts.values()):
            if not path.is_file():
                raise UserError(f"there is no text {path}: give --data, or --text-train and --text-test NAME=FILE")
        if VALID in self.test_texts:
            raise UserError(f"--text-test {VALID}=... is taken by the end of the training text: choose another name")


def texts(data: Path | None, train: Path | None, tests: Sequence[str] | None) -> tuple[Path, dict[str, Path]]:
    """The training text and the test texts by name.

    Raises:
        UserError: if neither a folder nor files say where they are.
    """
    named = dict(_named(test) for test in tests or ())
    if data is None and (train is None or not named):
        raise UserError("there are no texts: give --data FOLDER, or --text-train FILE and --text-test NAME=FILE")
    if data is not None:
        train = train or data / DATA_FILES["train"]
        named = named or {name: data / DATA_FILES[name] for name in ("books", "wikitext2")}
    assert train is not None
    return train, named


def _named(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals:
        raise UserError(f"--text-test {text} has no name: write --text-test NAME={text}")
    return name, Path(file)


def changes(fields: Sequence[str], known: Mapping[str, frozenset[str]]) -> dict[str, dict[str, Any]]:
    """``--set`` by method.

    Args:
        fields: ``FIELD=VALUE`` for every method, or ``METHOD:FIELD=VALUE``.
        known: the fields of each method that was chosen.

    Raises:
        UserError: if a method has no such field.
    """
    found: dict[str, dict[str, Any]] = {method: {} for method in known}
    for field in fields:
        place, equals, value = field.partition("=")
        if not equals:
            raise UserError(f"--set {field} says no value: write --set {field}=VALUE")
        chosen, colon, name = place.rpartition(":")
        if colon and chosen not in known:
            raise UserError(f"--set {field}: {chosen!r} is not among --methods {' '.join(known)}")
        for method in [chosen] if colon else list(known):
            if name not in known[method]:
                raise UserError(
                    f"--set {field}: {method} has no field {name!r}: choose from {', '.join(sorted(known[method]))}, "
                    "or name the method that it is for, METHOD:FIELD=VALUE"
                )
            found[method][name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
