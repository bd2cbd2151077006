"""What ``python -m benchmarks.adaptation run`` was asked."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.options import check_device, check_positive, check_shares
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.train.compiling import check_how

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
        check_positive(dataclasses.asdict(self))
        if self.context < 2:
            raise UserError("--context 1 leaves nothing to predict: give at least 2")
        self.rows_of(self.accumulation)
        if self.tokens < self.batch_tokens:
            raise UserError(f"--tokens {self.tokens} is less than a step of {self.batch_tokens}: give more")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Windows a batch."""
        return self.rows_of(self.accumulation)

    def rows_of(self, accumulation: int) -> int:
        """Windows a batch where a step takes this many.

        Raises:
            UserError: if they are no whole number.
        """
        if self.batch_tokens % (self.context * accumulation):
            raise UserError(
                f"--batch-tokens {self.batch_tokens} is no multiple of --context times --accumulation, "
                f"{self.context * accumulation}: steps would differ in size"
            )
        return self.batch_tokens // (self.context * accumulation)


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
        windows: of each text that perplexity is measured on, at most.
        search_windows: of these, on which tau is searched.
        eval_rows: windows that go through the model at once.
        calibration_tokens: that experts, routers and scores are made from.
        commit: what results say they were made from.
        command_line: for the record.
        compile: train compiled, in this mode of ``torch.compile``; the same for every method.
        seconds: of training a run, at most; a run that is cut short says so.
        session_seconds: no run starts later than this after the command.
    """

    model: str
    train_text: Path
    test_texts: Mapping[str, Path]
    output: Path
    budget: Budget
    sparsities: tuple[float, ...]
    device: str
    bf16: bool
    windows: int
    search_windows: int
    eval_rows: int
    calibration_tokens: int
    commit: str | None
    command_line: str
    compile: str | None = None
    seconds: float | None = None
    session_seconds: float | None = None

    def __post_init__(self) -> None:
        check_shares(self.sparsities)
        with as_user_error(ValueError):
            check_how(self.compile or False)
        names = ("windows", "search_windows", "eval_rows", "calibration_tokens", "seconds", "session_seconds")
        check_positive({name: getattr(self, name) for name in names})
        for path in (self.train_text, *self.test_texts.values()):
            if not path.is_file():
                raise UserError(f"there is no text {path}: give --data, or --text-train and --text-test NAME=FILE")
        if VALID in self.test_texts:
            raise UserError(f"--text-test {VALID}=... is taken by the end of the training text: choose another name")


def add_material(command: argparse.ArgumentParser) -> None:
    """The options that say what to train and measure, on what, and where the results go."""
    add = command.add_argument
    add("--model", required=True, help="folder, GGUF file or hub name of a dense causal language model")
    add("-o", "--output", type=Path, required=True, help="folder of results; may hold earlier ones")
    add("--data", type=Path, help="folder with books_train.txt.xz, books_test.txt.xz and wikitext2_test.raw.txt.gz")
    add("--text-train", type=Path, metavar="FILE", help="text to train on (plain, .gz or .xz)")
    add("--text-test", action="append", metavar="NAME=FILE", help="text to measure on; may be given several times")
    add("--context", type=int, default=512, help="tokens a window (default: 512)")
    add("--batch-tokens", type=int, default=16384, help="tokens a step (default: 16384)")
    add("--accumulation", type=int, default=1, help="batches a step (default: 1)")
    add("--windows", type=int, default=64, help="of each text to measure on, at most (default: 64)")
    add("--search-windows", type=int, default=8, help="of these, to search tau on (default: 8)")
    add("--eval-rows", type=int, default=8, help="windows measured at once (default: 8)")
    add("--calibration-tokens", type=int, default=16384)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="train in bfloat16 autocast; perplexity is always measured in float32")
    add("--commit", help="what results say they were made from (default: git's answer)")


def settings_of(
    arguments: argparse.Namespace, command_line: str, *, tokens: int, sparsities: Sequence[float], **only: Any
) -> Settings:
    """What the options of :func:`add_material` say.

    Args:
        arguments: parsed.
        command_line: for the record.
        tokens: of training a run.
        sparsities: that perplexity is measured at.
        **only: further fields of :class:`Settings`.

    Raises:
        UserError: if they are refused.
    """
    check_device(arguments.device)
    train, tests = texts(arguments.data, arguments.text_train, arguments.text_test)
    same = ("model", "output", "device", "bf16", "windows", "search_windows", "eval_rows", "calibration_tokens")
    return Settings(
        train_text=train,
        test_texts=tests,
        budget=Budget(tokens, arguments.context, arguments.batch_tokens, arguments.accumulation),
        sparsities=tuple(sorted(set(sparsities))),
        commit=arguments.commit,
        command_line=command_line,
        **{name: getattr(arguments, name) for name in same},
        **only,
    )


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
