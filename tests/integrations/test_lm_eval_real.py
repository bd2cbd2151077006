"""A real model on known benchmarks, through the command lines, with everything local: a folder and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import write_arc_easy, write_olmo_tasks

from torch_prunepath.commands.sweep.scores import scores_of
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch, load_gguf

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    for part in load_gguf(fetch(SMOLLM2, cache_folder())):
        part.save_pretrained(folder)
    return folder


def run(command: str, *arguments: object, cwd: Path) -> str:
    script = Path(sys.executable).with_name(command)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd)}
    shown = subprocess.run(
        [script, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )
    return shown.stdout


def evaluate(kind: str, options: str, tasks: Path, names: str, limit: int, cwd: Path) -> dict[str, Any]:
    run(
        "prunepath-eval",
        *("--model", kind, "--model_args", options, "--tasks", names, "--include_path", tasks, "--device", "cpu"),
        *("--batch_size", 4, "--limit", limit, "--output_path", cwd / kind),
        cwd=cwd,
    )
    (path,) = (cwd / kind).rglob("results_*.json")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def assert_same_scores(found: dict[str, Any], expected: dict[str, Any]) -> None:
    theirs = scores_of(expected)
    assert scores_of(found).keys() == theirs.keys()
    for task, scores in theirs.items():
        for metric, score in scores.items():
            assert scores_of(found)[task][metric]["value"] == pytest.approx(score["value"], rel=1e-4), (task, metric)


def test_hellaswag_and_mmlu_at_tau_1_score_as_hf_does(model: Path, tmp_path: Path) -> None:
    tasks = write_olmo_tasks(tmp_path / "tasks", tmp_path)
    names = "local_hellaswag,local_mmlu_anatomy"
    stock = evaluate("hf", f"pretrained={model}", tasks, names, 10, tmp_path)
    cheap = "partition=random,router=centroid,budget=uniform"
    ours = evaluate("prunepath", f"pretrained={model},tau=1,{cheap}", tasks, names, 10, tmp_path)
    assert_same_scores(ours, stock)
    assert ours["n-shot"]["local_mmlu_anatomy"] == 5
    assert ours["config"]["prunepath"]["sparsity"] == 0
    assert ours["config"]["prunepath"]["tokens"] > 3000  # most of them the five examples ahead of each question


@pytest.mark.shared_data
def test_a_sweep_over_arc(model: Path, tmp_path: Path) -> None:
    tasks = write_arc_easy(tmp_path / "tasks", Path(os.environ["PRUNEPATH_DATA"]))
    flags = ["--tasks", "local_arc_easy", "--include-path", tasks, "--limit", 40, "--batch-size", 8]
    settings = ["--sparsity", 0.3, "--calibration-tokens", 4096]
    results = json.loads(run("prunepath", "sweep", model, *flags, *settings, "--json", "-o", "out", cwd=tmp_path))
    dense, sparse = results["rows"]
    assert dense["scores"]["local_arc_easy"]["acc"]["value"] > 0.4
    assert sparse["scores"]["local_arc_easy"]["acc"]["value"] > 0.3
    assert sparse["sparsity"] == pytest.approx(0.3, abs=0.08)
    assert (tmp_path / "out" / "sweep.png").is_file()
