"""Tasks that only presets have: what a row becomes, what is cut, and how large batches are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.presets.figure4 import PRESET as FIGURE4
from benchmarks.presets.figure5 import PRESET as FIGURE5
from benchmarks.presets.stand_in import save_data, save_model
from benchmarks.presets.tasks import InstructTask, WritingTask
from benchmarks.sources import source, write
from torch_prunepath.console.errors import UserError
from torch_prunepath.train.batches import IGNORED


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(FIGURE4, tmp_path_factory.mktemp("gpt2")))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(FIGURE5, tmp_path_factory.mktemp("qwen2")))


def test_a_long_document_loses_its_end_and_the_summary_stays(gpt2: str, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = [{"document": f"{split} {'long ' * 100}", "summary": "short"}, {"document": "brief", "summary": "short"}]
        write(source("xsum"), split, rows, tmp_path)
    task = WritingTask("xsum", tmp_path, gpt2, new_tokens=8, batch=2, length=64, device="cpu")
    long, brief = task.train
    assert len(long["input_ids"]) <= 64 and len(task.prompt("x" * 500)) == 64 - 8
    for row in (long, brief):
        answer = [label for label in row["labels"] if label != IGNORED]
        assert task.tokenizer.decode(answer[:-1]) == " short" and answer[-1] == task.eos
        assert task.tokenizer.decode(row["input_ids"]).endswith("\n\nSummary: short<eos>")
    assert list(task.test) == [f"test {'long ' * 100}".strip(), "brief"]


def test_equal_meanings_share_their_references(gpt2: str, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = [{"meaning_representation": "name : A", "human_reference": text} for text in ("one", "two")]
        write(source("e2e"), split, rows, tmp_path)
    task = WritingTask("e2e", tmp_path, gpt2, new_tokens=8, batch=2, length=64, device="cpu")
    assert task.test == {"name : A": ["one", "two"]} and len(task.train) == 2


def test_the_loss_counts_what_the_assistant_says(qwen2: str, tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    unanswered = [{"role": "user", "content": "Hello?"}]
    write(source("tulu2"), "train", [{"messages": said}] * 12 + [{"messages": unanswered}], tmp_path)
    how: dict[str, Any] = {"checkpointing": False, "batch": 4, "device": "cpu"}
    task = InstructTask("tulu2", tmp_path, qwen2, length=200, **how)
    assert (len(task.train), len(task.select)) == (11, 1), "a conversation without an answer is left out"
    row = task.train[0]
    assert task.tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "Four.\n<eos>Yes.\n<eos>"
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    short = InstructTask("tulu2", tmp_path, qwen2, length=70, **how)
    assert len(short.train[0]["input_ids"]) == 70 and short.about != task.about


def test_a_step_has_its_rows_in_however_many_batches(qwen2: str, tmp_path: Path) -> None:
    data = save_data(FIGURE5, tmp_path)
    how: dict[str, Any] = {"checkpointing": False, "length": 64, "device": "cpu"}
    task = InstructTask("tulu2", data, qwen2, batch=8, accumulation=4, **how)
    whole, parts = list(task.batches(0)), list(task.batches(0, accumulation=4))
    assert whole[0]["input_ids"].shape[0] == 8 and parts[0]["input_ids"].shape[0] == 2
    assert len(whole) == -(-len(task.train) // 8) and len(parts) == -(-len(task.train) // 2)
    assert all(batch["input_ids"].shape[0] <= 2 for batch in task.calibration())
    with pytest.raises(UserError, match="--batch 6 is no multiple of the 4 batches"):
        InstructTask("tulu2", data, qwen2, batch=6, accumulation=4, **how)
    with pytest.raises(UserError, match="more than the"):
        InstructTask("tulu2", data, qwen2, batch=8, **{**how, "length": 100_000})


def test_gradient_checkpointing_is_switched_on(qwen2: str, tmp_path: Path) -> None:
    data = save_data(FIGURE5, tmp_path)
    for wanted in (True, False):
        task = InstructTask("tulu2", data, qwen2, checkpointing=wanted, batch=8, length=64, device="cpu")
        model: Any = task.fresh(0)
        assert model.is_gradient_checkpointing is wanted


def test_lm_eval_reads_the_folder_s_questions(qwen2: str, tmp_path: Path) -> None:
    data = save_data(FIGURE5, tmp_path / "data")
    task = InstructTask("tulu2", data, qwen2, checkpointing=False, batch=8, length=64, device="cpu")
    place = tmp_path / "place"
    place.mkdir()
    assert "mmlu" in task._tasks(place).all_tasks
    written = json.loads((place / "mmlu.yaml").read_text())
    assert written["dataset_kwargs"]["data_files"]["test"] == str(data / "mmlu_test.jsonl.gz")
