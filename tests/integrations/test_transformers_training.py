"""Sparse models in transformers' own Trainer, and under gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_llama import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from torch_prunepath import SparsifyConfig, sparse_layers, sparsify

SIGMOID = SparsifyConfig(
    expert_size=8, partition="kmeans", router="centroid", budget="uniform", gate="sigmoid", gate_offset=2.0
)


def rows(number: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(3, 90, (10,), generator=generator) for _ in range(number)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def trainer(folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        save_steps=3,
        eval_steps=3,
        eval_strategy="steps",
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    model = sparsify(tiny_llama(), 0.7, config=SIGMOID, progress=False)
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_trainer_end_to_end(tmp_path: Path) -> None:
    """Trains, evaluates, saves, takes the best back, and resumes to the same bits."""
    run = trainer(tmp_path / "run")
    before, start = weights(run.model), run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < start
    after = weights(run.model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "permutation" not in name}, "routers and weights alike"
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == ["checkpoint-3", "checkpoint-6"]

    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert len(sparse_layers(last)) == 2 and same(weights(last), after)
    run.save_model(str(tmp_path / "saved"))
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), after)

    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert same(weights(resumed.model), after)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5_gated"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model, inputs = ARCHITECTURES[name]()
    sparsify(model.double(), 0.6, config=SIGMOID, progress=False)
    model.train()
    inputs = {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # of dropout, which the second pass draws again
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert sum("router" in key and bool(grad.any()) for key, grad in expected.items()) >= 2
    calls = count_calls(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients()
    assert len(calls) == 2 * len(sparse_layers(model)), "each runs once more"
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12)


def count_calls(model: nn.Module) -> list[str]:
    calls: list[str] = []
    for name, layer in sparse_layers(model).items():
        layer.register_routing_hook(lambda routing, name=name: calls.append(name))
    return calls
