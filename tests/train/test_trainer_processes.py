"""``PrunePathTrainer`` in two processes (DistributedDataParallel, gloo) trains, logs, saves and resumes as in one."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM

from tests.train.test_trainer import PLAIN, rows, sparse, train_logs, trainer
from torch_prunepath.sparsity import measure_sparsity
from torch_prunepath.train import ramp

# Every token is fitted, and no target drawn: both depend on the batch's number in the step.
PHASES = (ramp(0.2, 0.5), ramp(0.5, 0.8))
CONFIG = dataclasses.replace(PLAIN, steps=6, phases=PHASES, accumulation=1, fit_tokens=24, distill_logits=0.5)


def run(folder: Path, config: Any, **changes: Any) -> Any:
    return trainer(folder, config, sparse(), teacher=tiny_llama(1), **changes)


def run_both(folder: Path) -> dict[str, Any]:
    """A run of its own, and one that stops and goes on."""
    whole = run(folder / "whole", CONFIG, eval_dataset=rows(4))
    whole.train()
    metrics = whole.evaluate()
    whole.save_model(str(folder / "saved"))
    run(folder / "parts", CONFIG, save_strategy="steps", save_steps=3).train()
    again = run(folder / "parts", CONFIG, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(folder / "parts" / "checkpoint-3"))
    return {
        "processes": whole.args.world_size,
        "logs": train_logs(whole),
        "weights": whole.model.state_dict(),
        "metrics": metrics,
        "resumed": again.model.state_dict(),
    }


def _process(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.save(run_both(Path(folder)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (str(folder), port), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_processes_train_as_one_with_twice_the_batches(results: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = results
    assert first["processes"] == second["processes"] == 2
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    config = dataclasses.replace(CONFIG, accumulation=2)
    alone = run(tmp_path, config)
    before = {key: value.clone() for key, value in alone.model.state_dict().items()}
    alone.train()
    for two, one in zip(first["logs"], train_logs(alone), strict=True):
        for name in ("sparsity", "tau", "target", *config.losses):
            assert two[name] == pytest.approx(one[name], rel=1e-2, abs=1e-6), (name, two["step"])
    for key, value in alone.model.state_dict().items():
        change, error = (value - before[key]).float().norm(), (value - first["weights"][key]).float().norm()
        assert error <= 0.05 * change + 1e-6, key


def test_a_checkpoint_of_two_processes_goes_on_to_the_same_weights(results: list[dict[str, Any]]) -> None:
    for result in results:
        for key, value in result["weights"].items():
            torch.testing.assert_close(result["resumed"][key], value, msg=key)


def test_evaluation_says_what_both_processes_realised(results: list[dict[str, Any]], folder: Path) -> None:
    first, second = (result["metrics"] for result in results)
    for name in ("eval_loss", "eval_sparsity", "eval_tau"):
        assert first[name] == pytest.approx(second[name], rel=1e-6), name
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved")
    batches = [{key: value[None] for key, value in row.items() if key != "labels"} for row in rows(4)]
    parts = [measure_sparsity(saved, batches[rank::2]) for rank in (0, 1)]
    assert first["eval_sparsity"] == pytest.approx(sum(parts) / 2, abs=0.05)
