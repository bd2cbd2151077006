"""Tasks that only presets have: GLUE, E2E and XSum from their own splits, and instruction tuning judged by MMLU.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from benchmarks.harness import Trained
from benchmarks.harness.store import digest, digest_of_model
from benchmarks.harness.task import Row
from benchmarks.presets.stand_in import MMLU
from benchmarks.sources import SOURCES, read
from benchmarks.tasks.e2e import E2ETask, can_score
from benchmarks.tasks.glue import GlueTask, Shape
from benchmarks.tasks.rows import Shuffled, calibration_of
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.train.batches import IGNORED


@dataclass(frozen=True)
class Writing:
    """How a text is asked for.

    Attributes:
        given: column with what the text is about.
        written: column with the text.
        ask: between the two.
    """

    given: str
    written: str
    ask: str


WRITING: Mapping[str, Writing] = MappingProxyType(
    {
        "e2e": Writing("meaning_representation", "human_reference", "\n\nDescription:"),
        "xsum": Writing("document", "summary", "\n\nSummary:"),
    }
)
SELECT_ROWS = 500
"""Rows of a validation split that learning rates are chosen by, at most: enough for a loss, and quick."""
HELD_OUT = 500
"""Conversations that choices are made by, where a data set has no validation split; at most a tenth of them."""
SHOTS = 5
"""MMLU's custom: examples before each question."""


PAIRS_WITH_F1 = ("mrpc", "qqp")
"""GLUE's tasks whose custom is to report F1 as well."""


def glue_task(name: str, folder: Path, model: str, **how: Any) -> GlueTask:
    """A GLUE task from its own splits; CoLA with Matthews' correlation, MRPC and QQP with F1.

    Raises:
        UserError: if data or model cannot be had.
    """
    source = SOURCES[name]
    files = (f"{name}_{split}" for split in source.splits)
    shape = Shape(source.columns[:-1], *files, f1=name in PAIRS_WITH_F1, matthews=name == "cola")
    return GlueTask(name, folder, model, shape=shape, **how)


class _Answers(E2ETask):
    """Prompts with answers for a causal language model; the loss counts answers.

    Args:
        model: folder of the model.
        batch: rows a step.
        length: tokens of prompt and answer, at most; what is too long loses the end of its prompt.
        device: where to run.
        accumulation: batches a step.

    Raises:
        UserError: if the model cannot be had, has no end-of-sequence token, or reads less than ``length``.
    """

    def __init__(self, model: str, *, batch: int, length: int, device: str, accumulation: int = 1) -> None:
        if batch % accumulation:
            raise UserError(f"--batch {batch} is no multiple of the {accumulation} batches of a step: give another")
        self.batch, self.length, self.device, self.accumulation = batch // accumulation, length, device, accumulation
        self.model, self.weights = Path(model).name, digest_of_model(Path(model))
        self._dense, self.tokenizer = load_model(model)
        self._dense = self._dense.float()
        if longest_context(self._dense) < length:
            raise UserError(f"{length} tokens a row are more than the {longest_context(self._dense)} of {model}")
        self.eos = self.tokenizer.eos_token_id
        if self.eos is None:
            raise UserError(f"the tokenizer of {model} has no end-of-sequence token: choose another model")
        pad = self.tokenizer.pad_token_id
        self.pad = {"input_ids": self.eos if pad is None else pad, "attention_mask": 0, "labels": IGNORED}

    def batches(self, seed: int, *, one_shape: bool = False, accumulation: int = 1, skip: int = 0) -> Shuffled:
        """Training batches with labels, in a new order at each pass; a step has the same rows in however many."""
        rows = self.batch * self.accumulation
        if rows % accumulation:
            raise UserError(f"accumulation={accumulation}: a step's {rows} rows are no multiple of it")
        return Shuffled(self.train, rows // accumulation, seed, self.pad, one_shape)

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels, as large as go through the model at once."""
        return calibration_of(self.batches(0, accumulation=self.accumulation), self.device)


class WritingTask(_Answers):
    """E2E or XSum: trained on the training split, chosen by the loss on the validation split, scored on the test split.

    Args:
        name: in :data:`WRITING`.
        folder: of the data.
        model: folder of the model.
        new_tokens: generated for a text, at most.
        **how: as :class:`_Answers`.

    Raises:
        UserError: as :class:`_Answers`, or if data or a package that scores are missing.
    """

    def __init__(self, name: str, folder: Path, model: str, *, new_tokens: int, **how: Any) -> None:
        if not can_score():
            raise UserError("texts are scored by two packages: pip install rouge-score sacrebleu")
        super().__init__(model, **how)
        self.name, self.writing, self.new_tokens = name, WRITING[name], new_tokens  # type: ignore[misc]
        self.eval_batch = 4 * self.batch
        parts = {split: self._pairs(name, split, folder) for split in ("train", "valid", "test")}
        self.about = {"data": digest([parts, self.length, new_tokens], 16), "batch": self.batch * self.accumulation}
        self.train = [self._row(*pair) for pair in parts["train"]]
        self.select = [self._row(*pair) for pair in parts["valid"][:SELECT_ROWS]]
        self.test: dict[str, list[str]] = {}
        for given, written in parts["test"]:
            self.test.setdefault(given, []).append(written)

    def _pairs(self, name: str, split: str, folder: Path) -> list[tuple[str, str]]:
        given, written = self.writing.given, self.writing.written
        return [(row[given].strip(), row[written].strip()) for row in read(SOURCES[name], split, folder)]

    def prompt(self, meaning: str) -> list[int]:
        """Tokens that generation goes on from; a long text loses its end, so that there is room to answer."""
        front, ask = self._front, self._ids(self.writing.ask)
        room = self.length - self.new_tokens - len(front) - len(ask)
        return front + self._ids(meaning)[: max(1, room)] + ask

    def _measured(self, trained: Trained) -> Row:
        found = super()._measured(trained)
        # In the order of the test split: as keys, XSum's documents would make every record a hundred megabytes.
        return {"select": found["select"], "report": found["report"], "texts": list(found["generated"].values())}

    def _row(self, meaning: str, text: str) -> Row:
        row = super()._row(meaning, text)
        return {key: ids[: self.length] for key, ids in row.items()}


class InstructTask(_Answers):
    """Conversations: trained on what the assistant says, judged by MMLU.

    Args:
        name: of the source.
        folder: of the data; holds MMLU's questions as well, unless lm-eval shall fetch its own.
        model: folder of the model.
        checkpointing: train with gradient checkpointing.
        **how: as :class:`_Answers`.

    Raises:
        UserError: as :class:`_Answers`, or if data are missing or too few.
    """

    tuned = False
    packages: tuple[str, ...] = ("lm_eval",)

    def __init__(self, name: str, folder: Path, model: str, *, checkpointing: bool, **how: Any) -> None:
        super().__init__(model, **how)
        self.name, self.checkpointing, self.folder = name, checkpointing, folder  # type: ignore[misc]
        said = [row["messages"] for row in read(SOURCES[name], "train", folder)]
        rows = [row for row in map(self._talk, said) if any(label != IGNORED for label in row["labels"])]
        kept = min(HELD_OUT, len(rows) // 10)
        if kept < 1:
            raise UserError(
                f"{name} has {len(rows)} conversations with answers: some must be kept, so give ten or more"
            )
        self.train, self.select = rows[:-kept], rows[-kept:]
        parts = [digest(messages, 16) for messages in said]
        self.about = {"data": digest([parts, self.length], 16), "batch": self.batch * self.accumulation}
        self.files = {split: folder / f"{MMLU.name}_{split}.jsonl.gz" for split in MMLU.splits}

    def _talk(self, messages: Sequence[Mapping[str, str]]) -> Row:
        """A conversation as one row; labels are the assistant's words and the end after them."""
        ids = list(self._front)
        labels = [IGNORED] * len(ids)
        for message in messages:
            head = self._ids(f"<|{message['role']}|>\n")
            words = self._ids(message["content"].strip() + "\n")
            assistant = message["role"] == "assistant"
            words = [*words, self.eos] if assistant else words
            ids += head + words
            labels += [IGNORED] * len(head) + (words if assistant else [IGNORED] * len(words))
        ids, labels = ids[: self.length], labels[: self.length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model; it has no head that a seed could draw."""
        model: Any = super().fresh(seed)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model  # type: ignore[no-any-return]

    def _measured(self, trained: Trained) -> Row:
        return {"select": self._loss(trained), "report": self._judged(trained)}

    def _judged(self, trained: Trained) -> dict[str, Any]:
        """MMLU's accuracy, and the sparsity while it was answered."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        from torch_prunepath.integrations.lm_eval import PrunePathLM

        routed = any(isinstance(module, RoutedExperts) for module in trained.model.modules())
        same = {"pretrained": trained.model, "tokenizer": self.tokenizer, "batch_size": self.batch}
        lm = PrunePathLM(**same) if routed else HFLM(**same)
        with trained.knob.recording() as record, tempfile.TemporaryDirectory() as place:
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=[MMLU.name],
                task_manager=self._tasks(Path(place)),
                num_fewshot=SHOTS,
                bootstrap_iters=0,
                log_samples=False,
            )
        accuracy = float(found["results"][MMLU.name]["acc,none"])
        return {"mmlu": accuracy, "sparsity": lm.sparsity_info()["sparsity"] if routed else record.sparsity}

    def _tasks(self, place: Path) -> Any:
        """lm-eval's own MMLU, or one task of its kind over the folder's questions, described in ``place``."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        if not self.files["test"].is_file():
            return TaskManager()
        template = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / "_default_template_yaml"
        files = {split: str(path) for split, path in self.files.items()}
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        task = {"include": str(template), "task": MMLU.name, **data}
        (place / f"{MMLU.name}.yaml").write_text(json.dumps(task))  # JSON is YAML
        return TaskManager(include_path=str(place), include_defaults=False)
