"""Books: perplexity against sparsity after equal training, every method on the same model, data, tokens and seeds.

    python -m benchmarks books run --model DIR_OR_GGUF --data FOLDER --device cuda --bf16 -o OUT
    python -m benchmarks books report OUT

Each run writes one JSON file once it is done. Runs that are done are skipped, so that the same command goes on where it
was stopped; and several processes may work on one folder at the same time, on other runs each. Converted models and
token ids are kept in ``OUT/cache``, which can be removed when all is done. With ``--session-seconds 1e-9`` nothing is
trained, only texts are tokenised: ``cache/tokens-*`` may be copied to another machine, which needs the texts as well.

Recipes change without code, for every method chosen or for one, and the report keeps them apart:

    --methods held static-norm --set distill_logits=1 --set held:expert_size=16
    --methods held --set "phases=[('sparsity', 0.0, 'target', 1.0), ('sparsity', 'target', 'target', 4.0)]"

Shapes: N windows of C tokens.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.harness import METHODS, Store, Trained, run
from benchmarks.harness.curves import BOOKS, VALID, report
from benchmarks.harness.jobs import check_positive
from benchmarks.harness.options import add_methods, dispatch, options_of, outcome_said, run_and_report
from benchmarks.harness.store import Cache, digest, digest_of_model
from benchmarks.harness.task import Row
from benchmarks.harness.texts import fingerprint, read_text, spread, tokenise, windows
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.evaluation.perplexity import mean_loss
from torch_prunepath.inputs.front import added_tokens, as_batch, front_tokens
from torch_prunepath.train.batches import Batches, Later

NAME = BOOKS
DATA_FILES = {"train": "books_train.txt.xz", "books": "books_test.txt.xz", "wikitext2": "wikitext2_test.raw.txt.gz"}
"""What ``--data`` is expected to hold."""
LARGEST_LOSS = 100.0
"""Losses above it are shown as this one's perplexity, which JSON can still hold."""


@dataclass(frozen=True)
class Budget:
    """What each step trains on.

    Attributes:
        context: C.
        batch_tokens: tokens a step.
        accumulation: batches a step.
    """

    context: int = 512
    batch_tokens: int = 16384
    accumulation: int = 1

    def __post_init__(self) -> None:
        check_positive(dataclasses.asdict(self))
        if self.context < 2:
            raise UserError("--context 1 leaves nothing to predict: give at least 2")
        self.rows_of(self.accumulation)

    def steps_of(self, tokens: int) -> int:
        """Whole steps that these tokens are enough for.

        Raises:
            UserError: if there is none.
        """
        if tokens < self.batch_tokens:
            raise UserError(f"--tokens {tokens} is less than a step of {self.batch_tokens}: give more")
        return tokens // self.batch_tokens

    def rows_of(self, accumulation: int) -> int:
        """Windows a batch where a step takes this many batches.

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
class Measuring:
    """How much is measured, and made from how much.

    Attributes:
        windows: of each text that perplexity is measured on, at most.
        search_windows: of these, on which tau is searched.
        eval_rows: windows that go through the model at once.
        calibration_tokens: that experts, routers and scores are made from.
    """

    windows: int = 64
    search_windows: int = 8
    eval_rows: int = 8
    calibration_tokens: int = 16384

    def __post_init__(self) -> None:
        check_positive(dataclasses.asdict(self))


@dataclass(frozen=True)
class Texts:
    """Which texts there are.

    Attributes:
        train: file to train on (plain, .gz or .xz); its end is held out as the text ``valid``.
        tests: files to measure on, by name.
    """

    train: Path
    tests: Mapping[str, Path]

    def __post_init__(self) -> None:
        for path in (self.train, *self.tests.values()):
            if not path.is_file():
                raise UserError(f"there is no text {path}: give --data, or --text-train and --text-test NAME=FILE")
        if VALID in self.tests:
            raise UserError(f"--text-test {VALID}=... is taken by the end of the training text: choose another name")


class BooksTask:
    """Language modelling on a long text; perplexity on that text's held-out end and on others.

    Args:
        model: folder, GGUF file or hub name of a causal language model.
        texts: which.
        cache: keeps token ids, and models that take long to load.
        budget: of each step.
        measuring: how much.
        device: where to run.

    Raises:
        UserError: if the model or a text cannot be had or is too short.
    """

    name = NAME
    tuned, causal = False, True
    packages: tuple[str, ...] = ()

    def __init__(
        self,
        model: str,
        texts: Texts,
        cache: Cache,
        *,
        budget: Budget = Budget(),
        measuring: Measuring = Measuring(),
        device: str = "cpu",
    ) -> None:
        self.budget, self.measuring, self.device, self._cache = budget, measuring, device, cache
        self.model, self.weights = Path(model).name, digest_of_model(Path(model)) if Path(model).exists() else model
        self._dense, self.tokenizer = self._load(model)
        if budget.context > longest_context(self._dense):
            raise UserError(f"--context {budget.context} is longer than the model's {longest_context(self._dense)}")
        self.front = front_tokens(self.tokenizer)
        all_NC = self._windows(texts.train)
        count = min(measuring.windows, len(all_NC) // 10)
        rows = budget.rows_of(budget.accumulation)
        usable = len(all_NC) - count - (len(all_NC) - count) % rows
        if count < 1 or usable < rows:
            raise UserError(f"{texts.train} has {all_NC.numel()} tokens: give a longer text, or smaller batches")
        self.train_NC = all_NC[:usable]
        self.texts = {name: spread(self._windows(path), measuring.windows) for name, path in texts.tests.items()}
        self.texts |= {VALID: all_NC[-count:]}
        self.calibration_NC = spread(self.train_NC, max(1, measuring.calibration_tokens // budget.context))
        shown = {"train": self.train_NC, "calibration": self.calibration_NC, **self.texts}
        self.about = {
            "budget": {"context": budget.context, "batch_tokens": budget.batch_tokens},
            "texts": {name: fingerprint(window_NC) for name, window_NC in shown.items()},
            "windows": measuring.windows,
            "search_windows": measuring.search_windows,
        }
        self.accumulation, self.step_tokens = budget.accumulation, budget.batch_tokens
        self.calibration_tokens = measuring.calibration_tokens

    def fresh(self, seed: int) -> nn.Module:
        """A copy of the dense model; it has no head that a seed could draw."""
        return copy.deepcopy(self._dense).to(self.device)  # type: ignore[no-any-return]

    def batches(self, seed: int, *, one_shape: bool = False, accumulation: int = 1, skip: int = 0) -> Later:
        """The training windows in the order that the seed decides, the same in every pass, all of one shape.

        Raises:
            UserError: if steps would differ in size.
        """
        return Later(Batches(self.train_NC, self.budget.rows_of(accumulation), seed, self.front), skip)

    def calibration(self) -> dict[str, Any]:
        """Some training windows, int64 ``[N, C]`` on the device, as a batch."""
        return as_batch(self.calibration_NC.to(self.device), self.front)

    def evaluate(self, trained: Trained, sparsity: Sequence[float]) -> list[Row]:
        """Perplexity on each text at each sparsity, which is that of the text."""
        rows = []
        for text, window_NC in self.texts.items():
            search = self._inputs(spread(window_NC, self.measuring.search_windows))
            for setting in trained.settings(sparsity, search):
                reached = "unreachable" not in setting
                rows.append({"text": text, **setting, **(self.measure(trained, text) if reached else {})})
        return rows

    def measure(self, trained: Trained, text: str) -> Row:
        """Realised sparsity and perplexity on a text, as the model stands."""
        with trained.knob.recording(self.front) as record:
            shown = {"rows": self.measuring.eval_rows, "front_tokens": self.front, "title": text}
            loss = mean_loss(trained.model, self.texts[text], **shown)
        # What is not finite stays so, and makes the run one that failed.
        return {"sparsity": record.sparsity, "perplexity": math.exp(min(loss, LARGEST_LOSS)) if loss == loss else loss}

    def _inputs(self, window_NC: Tensor) -> list[dict[str, Any]]:
        parts = window_NC.split(self.measuring.eval_rows)
        return [as_batch(part_BC.to(self.device), self.front) | {"use_cache": False} for part_BC in parts]

    def _load(self, model: str) -> tuple[Any, Any]:
        if model.endswith(".gguf") and Path(model).exists():  # those take long to load

            def convert(folder: Path) -> None:
                for part in load_model(model):
                    part.save_pretrained(folder)

            model = str(self._cache.place("model", self.weights, convert))
        dense, tokenizer = load_model(model)
        return dense.float(), tokenizer

    def _windows(self, path: Path) -> Tensor:
        """Every window of a text, int64 ``[N, C]``."""
        # Not the model's files, so that token ids made on another machine serve as well.
        about = [digest_of_model(path), digest(self.tokenizer.get_vocab())]
        tensors, *_ = self._cache.tensors("tokens", about, lambda: self._tokenised(path))
        return windows(tensors["ids_T"], self.budget.context, added_tokens(self.tokenizer).front)

    def _tokenised(self, path: Path) -> tuple[dict[str, Tensor], Any]:
        return {"ids_T": tokenise(read_text(path), self.tokenizer)}, path.name


# --- the command line -------------------------------------------------------------------------------------------------


def add_task(command: argparse.ArgumentParser) -> None:
    """The options that say what to train and measure on, but for the model."""
    add = command.add_argument
    budget, measuring = Budget(), Measuring()
    add("--data", type=Path, help="folder with books_train.txt.xz, books_test.txt.xz and wikitext2_test.raw.txt.gz")
    add("--text-train", type=Path, metavar="FILE", help="text to train on (plain, .gz or .xz)")
    add("--text-test", action="append", metavar="NAME=FILE", help="text to measure on; may be given several times")
    add("--context", type=int, default=budget.context, help="tokens a window (default: 512)")
    add("--batch-tokens", type=int, default=budget.batch_tokens, help="tokens a step (default: 16384)")
    add("--accumulation", type=int, default=budget.accumulation, help="batches a step (default: 1)")
    add("--windows", type=int, default=measuring.windows, help="of each text to measure on, at most (default: 64)")
    add("--search-windows", type=int, default=measuring.search_windows, help="of these, to search tau on (default: 8)")
    add("--eval-rows", type=int, default=measuring.eval_rows, help="windows measured at once (default: 8)")
    add("--calibration-tokens", type=int, default=measuring.calibration_tokens)


def budget_of(arguments: argparse.Namespace) -> Budget:
    """What the options of :func:`add_task` say of steps.

    Raises:
        UserError: if they are refused.
    """
    return Budget(arguments.context, arguments.batch_tokens, arguments.accumulation)


def task_of(arguments: argparse.Namespace) -> BooksTask:
    """What the options of :func:`add_task` say.

    Raises:
        UserError: if they are refused, or model or texts cannot be had.
    """
    a = arguments
    measuring = Measuring(a.windows, a.search_windows, a.eval_rows, a.calibration_tokens)
    how = {"budget": budget_of(a), "measuring": measuring, "device": a.device}
    return BooksTask(a.model, texts_of(a.data, a.text_train, a.text_test), Store(a.output).cache, **how)


def texts_of(data: Path | None, train: Path | None, tests: Sequence[str] | None) -> Texts:
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
    return Texts(train, named)


def _named(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals:
        raise UserError(f"--text-test {text} has no name: write --text-test NAME={text}")
    return name, Path(file)


def _add_run(command: argparse.ArgumentParser) -> None:
    names = [name for name, method in METHODS.items() if method.fits(BooksTask) and name != "d2dmoe-held"]
    add_methods(command, BooksTask, names, [0.3, 0.5, 0.7, 0.8, 0.9], 2e-4)
    add_task(command)
    command.add_argument("--tokens", type=int, default=5_800_000, help="of training a run (default: 5.8 million)")


def _run(arguments: argparse.Namespace, command_line: str) -> str:
    steps = budget_of(arguments).steps_of(arguments.tokens)
    options = options_of(arguments, command_line, steps=steps)
    Store(arguments.output).check_free()
    return outcome_said(run([task_of(arguments)], options), arguments.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    commands = {"run": _run, "report": lambda arguments, _: report(arguments.place, as_json=arguments.json)}
    return dispatch(NAME, run_and_report(NAME, __doc__, _add_run), commands, argv)
