"""E2E: BLEU and ROUGE-L against sparsity; a causal language model describes restaurants, dense and made sparse.

    python -m benchmarks e2e run --model DIR_OR_GGUF --data DIR --sparsity 0.3 0.5 0.7 --seeds 0 1 2 -o OUT
    python -m benchmarks e2e report OUT --data DIR

DIR of the data holds ``e2e_valid.jsonl.gz``, which is trained on but for a tenth of its meaning representations, kept
for choices (by loss), and ``e2e_test.jsonl.gz``, whose texts are scored against all their references. Nothing is
downloaded. Every method starts from the same fine-tuned dense model and takes the same number of optimiser steps on the
same data. BLEU and ROUGE-L need sacrebleu and rouge_score; a machine without them keeps the texts in the runs' files,
and ``report`` scores them where the packages are.

Fine-tuned and converted models are kept in ``OUT/cache``, which may be removed, and shared by processes with the same
OUT. With ``--compile`` every method trains compiled, wherever it does not work by hooks, on the same batches padded to
one shape.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.harness import Store, Trained, run
from benchmarks.harness.jobs import check_positive
from benchmarks.harness.options import dispatch, outcome_said, run_and_report
from benchmarks.harness.scores import write_report
from benchmarks.harness.store import Record, digest, digest_of_model, records_of
from benchmarks.harness.task import Row
from benchmarks.tasks.rows import (
    Inputs,
    Shuffled,
    add_task,
    calibration_of,
    on_device,
    options_of_rows,
    padded,
    read_rows,
)
from torch_prunepath.baselines.routed import CALIBRATION_TOKENS
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.inputs.data import evaluating, evaluation_mode
from torch_prunepath.inputs.front import added_tokens
from torch_prunepath.train.batches import IGNORED

NAME = "e2e"
METRICS = ("bleu", "rouge_l")
SCALE = {"rouge_l": 100.0}
SCORERS = ("rouge_score", "sacrebleu")
TRAIN, TEST = "e2e_valid", "e2e_test"
SELECT_ONE_IN = 10
PROMPT = "{}\n\nDescription:"


# --- data -------------------------------------------------------------------------------------------------------------


def references(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The references of each meaning representation, in the order of the file.

    Raises:
        UserError: if a row lacks a field, or there is none.
    """
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        for name in ("meaning_representation", "human_reference"):
            if not isinstance(row.get(name), str):
                raise UserError(f"row {number} has no {name!r}: get the E2E data again")
        found.setdefault(row["meaning_representation"].strip(), []).append(row["human_reference"].strip())
    if not found:
        raise UserError("the E2E data hold no row: get them again")
    return found


def split(meanings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Meaning representations to train on and to choose by: fixed, whatever their order; at least one of each."""
    ordered = sorted(set(meanings), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    number = max(1, len(ordered) // SELECT_ONE_IN)
    if len(ordered) <= number:
        raise UserError("the E2E data hold too few meaning representations to keep some for choices: get them again")
    return sorted(ordered[number:]), sorted(ordered[:number])


# --- scores -----------------------------------------------------------------------------------------------------------


def can_score() -> bool:
    """Whether the packages that score are there."""
    return all(importlib.util.find_spec(name) is not None for name in SCORERS)


def scores(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU (sacreBLEU's, 0 to 100) and mean ROUGE-L (F, best reference of each, 0 to 1).

    Args:
        generated: one text each.
        references: one or several texts each.

    Raises:
        UserError: if a package is missing.
    """
    if not can_score():
        raise UserError(f"scores need {' and '.join(SCORERS)}: pip install rouge-score sacrebleu")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(generated, references, strict=True))
    rouge = [scorer.score_multi(list(texts), text)["rougeL"].fmeasure for text, texts in pairs]
    # sacreBLEU takes first references, then second ones, and so on; None where there is none.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    bleu = BLEU(force=True).corpus_score(list(generated), streams)  # force: the texts are tokenised already
    return {"bleu": float(bleu.score), "rouge_l": sum(rouge) / len(rouge)}


def unscored(run: Record) -> list[Row]:
    """The rows of a run that hold texts without scores."""
    return [row for row in run["rows"] if "generated" in row and "bleu" not in row["report"]]


def score_run(run: Record, texts: dict[str, list[str]]) -> bool:
    """Score what a run generated and has not been scored yet, in place; whether there was any.

    Raises:
        UserError: if the run was made with other data, or a package is missing.
    """
    pending = unscored(run)
    for point in pending:
        if any(meaning not in texts for meaning in point["generated"]):
            raise UserError(f"a run was made with other data than this {TEST}: name its folder with --data")
        meanings = list(point["generated"])
        point["report"] |= scores([point["generated"][m] for m in meanings], [texts[m] for m in meanings])
    if pending:
        run["versions"] |= {name: metadata.version(name) for name in SCORERS}
    return bool(pending)


# --- the task ---------------------------------------------------------------------------------------------------------


class E2ETask:
    """Descriptions of restaurants.

    Args:
        folder: of the data.
        model: folder or GGUF file of a causal language model.
        batch: rows a training batch.
        eval_batch: rows a batch of generation.
        new_tokens: generated at most.
        meanings: test meaning representations to generate for, the first of the file; None: all.
        device: where to run.

    Raises:
        UserError: if data or model cannot be had.
    """

    name = NAME
    tuned, causal = True, True
    accumulation, step_tokens, calibration_tokens = 1, None, CALIBRATION_TOKENS
    packages: tuple[str, ...] = SCORERS

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        batch: int,
        eval_batch: int,
        new_tokens: int,
        meanings: int | None,
        device: str,
    ) -> None:
        self.batch, self.eval_batch, self.new_tokens, self.device = batch, eval_batch, new_tokens, device
        known, test = references(read_rows(folder, TRAIN)), references(read_rows(folder, TEST))
        self.test = dict(itertools.islice(test.items(), meanings))
        self.about = {"data": digest([known, self.test, new_tokens, PROMPT], 16), "batch": batch}
        train, select = split(list(known))
        self.model, self.weights = Path(model).name, digest_of_model(Path(model))
        self._dense, self.tokenizer = load_model(model)
        self._dense = self._dense.float()
        self.eos = self.tokenizer.eos_token_id
        if self.eos is None:
            raise UserError(f"the tokenizer of {model} has no end-of-sequence token: choose another model")
        pad = self.tokenizer.pad_token_id
        self.pad = {"input_ids": self.eos if pad is None else pad, "attention_mask": 0, "labels": IGNORED}
        self.train = [self._row(meaning, text) for meaning in train for text in known[meaning]]
        self.select = [self._row(meaning, text) for meaning in select for text in known[meaning]]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @functools.cached_property
    def _front(self) -> list[int]:
        """What the tokenizer puts in front of every text."""
        return list(added_tokens(self.tokenizer).front)

    def prompt(self, meaning: str) -> list[int]:
        """Tokens that generation goes on from."""
        return self._front + self._ids(PROMPT.format(meaning))

    def _row(self, meaning: str, text: str) -> Row:
        """Prompt and reference as one row; the loss counts the reference and its end."""
        prompt, answer = self.prompt(meaning), [*self._ids(f" {text}"), self.eos]
        ids = prompt + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}

    def batches(self, seed: int, *, one_shape: bool = False, accumulation: int = 1, skip: int = 0) -> Shuffled:
        """Training batches with labels, in a new order at each pass."""
        return Shuffled(self.train, self.batch, seed, self.pad, one_shape)

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels."""
        return calibration_of(self.batches(0), self.device)

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model; it has no head that a seed could draw."""
        return copy.deepcopy(self._dense).to(self.device)  # type: ignore[no-any-return]

    def evaluate(self, trained: Trained, sparsity: Sequence[float]) -> list[Row]:
        """Loss on the kept meaning representations, which choices are made by; texts for the test's, with scores."""
        found = []
        for row in trained.settings(sparsity, self.calibration()):
            found.append(row if "unreachable" in row else {**row, **self._measured(trained)})
        return found

    def _measured(self, trained: Trained) -> Row:
        select = self._loss(trained)
        generated = self.generate(trained.model)
        report = {"meanings": len(generated), "sparsity": self._sparsity(trained, generated)}
        texts = {meaning: text for meaning, (text, _) in generated.items()}
        if can_score():
            report |= scores(list(texts.values()), [self.test[meaning] for meaning in texts])
        return {"select": select, "report": report, "generated": texts}

    def _loss(self, trained: Trained) -> dict[str, Any]:
        total, labels = 0.0, 0
        rows = sorted(self.select, key=lambda row: len(row["input_ids"]))
        with evaluating(trained.model), trained.knob.recording() as record:
            for start in range(0, len(rows), self.batch):
                batch = on_device(padded(rows[start : start + self.batch], self.pad), self.device)
                number = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(trained.model(**batch, use_cache=False).loss) * number
                labels += number
        return {"loss": total / labels, "score": -total / labels, "sparsity": record.sparsity}

    def generate(self, model: Any) -> dict[str, tuple[str, list[int]]]:
        """For each of the test's meaning representations the greedy text and its tokens, without the end.

        Rows are padded on the left, so that all go on from their last token.
        """
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.eos,
            pad_token_id=self.pad["input_ids"],
        )
        found: dict[str, tuple[str, list[int]]] = {}
        with evaluation_mode(model), torch.inference_mode():
            for meanings, batch in self._prompts():
                ids = model.generate(**on_device(batch, self.device), generation_config=settings)
                for meaning, row in zip(meanings, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    tokens = row[: row.index(self.eos)] if self.eos in row else row
                    found[meaning] = self._text(tokens), tokens
        return {meaning: found[meaning] for meaning in self.test}

    def _text(self, tokens: list[int]) -> str:
        # References have spaces around punctuation, and so do texts: they stay.
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _prompts(self) -> Iterator[tuple[list[str], Inputs]]:
        """Prompts of like length together, with less padding."""
        prompts = {meaning: self.prompt(meaning) for meaning in self.test}
        ordered = sorted(prompts, key=lambda meaning: len(prompts[meaning]))
        for start in tqdm(range(0, len(ordered), self.eval_batch), desc="generating", leave=False, disable=None):
            some = ordered[start : start + self.eval_batch]
            rows = [{"input_ids": prompts[m], "attention_mask": [1] * len(prompts[m])} for m in some]
            yield some, padded(rows, self.pad, left=True)

    def _sparsity(self, trained: Trained, generated: dict[str, tuple[str, list[int]]]) -> float:
        """Over prompts and what was generated, read once more in one piece.

        While generating, rows that have ended go on with padding that the model cannot tell from text.
        """
        rows = []
        for meaning, (_, tokens) in generated.items():
            ids = self.prompt(meaning) + tokens
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        rows.sort(key=lambda row: len(row["input_ids"]))
        with evaluating(trained.model), trained.knob.recording() as record:
            for start in range(0, len(rows), self.batch):
                batch = on_device(padded(rows[start : start + self.batch], self.pad), self.device)
                trained.model(**batch, use_cache=False)
        return record.sparsity


# --- the command line -------------------------------------------------------------------------------------------------


def _add_run(command: argparse.ArgumentParser) -> None:
    add_task(command, E2ETask, batch=32, lr=2e-4)
    command.add_argument("--eval-batch", type=int, default=128, help="rows a batch of generation")
    command.add_argument("--new-tokens", type=int, default=96, help="generated for a text, at most")
    command.add_argument("--meanings", type=int, help="generate for the first of the test file only (default: all)")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", type=Path, help="folder of the data; needed if there is something to score")


def _run(arguments: argparse.Namespace, command_line: str) -> str:
    options = options_of_rows(arguments, command_line)
    sizes = {name: getattr(arguments, name) for name in ("eval_batch", "new_tokens", "meanings")}
    check_positive(sizes)
    task = E2ETask(arguments.data, arguments.model, batch=arguments.batch, device=arguments.device, **sizes)
    return outcome_said(run([task], options), arguments.json)


def _report(arguments: argparse.Namespace, _: str) -> str:
    records = records_of(arguments.place, [NAME])
    score_all(arguments.place, records, arguments.data)
    results, text = write_report(arguments.place, records, METRICS, SCALE)
    return json.dumps(results) if arguments.json else text


def score_all(place: Path, records: dict[str, Record], data: Path | None) -> None:
    """Score the runs that are not scored yet, and keep what that gives if ``place`` is a folder of results.

    Raises:
        UserError: if there are some, and data or a package is missing.
    """
    pending = [name for name, record in records.items() if unscored(record)]
    if not pending:
        return
    if data is None:
        raise UserError(f"{len(pending)} runs are not scored yet: name the folder of {TEST} with --data")
    texts = references(read_rows(data, TEST))
    for name in pending:
        score_run(records[name], texts)
        if place.is_dir():
            Store(place).write(name, records[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    parser = run_and_report(NAME, __doc__, _add_run, _add_report)
    return dispatch(NAME, parser, {"run": _run, "report": _report}, argv)
