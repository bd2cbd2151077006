"""E2E: descriptions of restaurants from their attributes, by a causal language model; BLEU and ROUGE-L.

Trained on the validation file, of which a tenth of the meaning representations is kept for choices (by loss); generated
and scored on the test file, against all references of each. Scores need the packages ``rouge_score`` and ``sacrebleu``;
where they are missing, what was generated is kept to be scored elsewhere.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common.store import Run, digest
from benchmarks.tasks.glue import CALIBRATION_BATCHES, Inputs, Row, Shuffled, padded, read_rows
from benchmarks.tasks.runs import measured
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.inputs.data import evaluation_mode
from torch_prunepath.train.batches import IGNORED

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


def score_run(run: Run, texts: dict[str, list[str]]) -> bool:
    """Score what a run generated and has not been scored yet, in place; whether there was any.

    Raises:
        UserError: if the run was made with other data, or a package is missing.
    """
    pending = [point for point in run["points"] if "bleu" not in point["report"]]
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
    """E2E, for :class:`~benchmarks.tasks.runs.Runner`.

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

    name = "e2e"
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
        self.digest = digest([known, self.test, new_tokens, PROMPT], 16)
        train, select = split(list(known))
        self.model, self.tokenizer = load_model(model)
        self.model = self.model.float()
        self.eos = self.tokenizer.eos_token_id
        if self.eos is None:
            raise UserError(f"the tokenizer of {model} has no end-of-sequence token: choose another model")
        pad = self.tokenizer.pad_token_id
        self.pad = {"input_ids": self.eos if pad is None else pad, "attention_mask": 0, "labels": IGNORED}
        self.train = [self._row(meaning, text) for meaning in train for text in known[meaning]]
        self.select = [self._row(meaning, text) for meaning in select for text in known[meaning]]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, meaning: str) -> list[int]:
        """Tokens that generation goes on from."""
        return self._ids(PROMPT.format(meaning))

    def _row(self, meaning: str, text: str) -> Row:
        """Prompt and reference as one row; the loss counts the reference and its end."""
        prompt, answer = self.prompt(meaning), [*self._ids(f" {text}"), self.eos]
        ids = prompt + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}

    def batches(self, seed: int, one_shape: bool = False) -> Shuffled:
        """Training batches with labels, in a new order at each pass."""
        return Shuffled(self.train, self.batch, seed, self.pad, one_shape)

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels."""
        some = itertools.islice(Shuffled(self.train, self.batch, 0, self.pad), CALIBRATION_BATCHES)
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in some]

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model; it has no head that a seed could draw."""
        return copy.deepcopy(self.model).to(self.device)  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, sparse: bool) -> dict[str, Any]:
        """Loss on the kept meaning representations, which choices are made by; texts for the test's, with scores."""
        select = self._loss(model, sparse)
        generated = self.generate(model)
        report: dict[str, Any] = {"meanings": len(generated)}
        if sparse:
            report["sparsity"] = self._sparsity(model, generated)
        texts = {meaning: text for meaning, (text, _) in generated.items()}
        if can_score():
            report |= scores(list(texts.values()), [self.test[meaning] for meaning in texts])
        return {"select": select, "report": report, "generated": texts}

    def _loss(self, model: nn.Module, sparse: bool) -> dict[str, Any]:
        total, labels = 0.0, 0
        rows = sorted(self.select, key=lambda row: len(row["input_ids"]))
        with measured(model, sparse) as record:
            for start in range(0, len(rows), self.batch):
                batch = self._on_device(padded(rows[start : start + self.batch], self.pad))
                number = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(model(**batch, use_cache=False).loss) * number
                labels += number
        found = {"loss": total / labels, "score": -total / labels}
        return found if record is None else {**found, "sparsity": record.sparsity}

    def _on_device(self, batch: Inputs) -> Inputs:
        return {key: value.to(self.device) for key, value in batch.items()}

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
                ids = model.generate(**self._on_device(batch), generation_config=settings)
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

    def _sparsity(self, model: nn.Module, generated: dict[str, tuple[str, list[int]]]) -> float:
        """Over prompts and what was generated, read once more in one piece.

        While generating, rows that have ended go on with padding that the model cannot tell from text.
        """
        rows = []
        for meaning, (_, tokens) in generated.items():
            ids = self.prompt(meaning) + tokens
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        rows.sort(key=lambda row: len(row["input_ids"]))
        with measured(model, sparse=True) as record:
            for start in range(0, len(rows), self.batch):
                model(**self._on_device(padded(rows[start : start + self.batch], self.pad)), use_cache=False)
        assert record is not None
        return record.sparsity
