"""Training PrunePath adapters: transformers' Trainer, the library's own loop, and what gradients reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from torch_prunepath import set_tau, sparse_layers, sparsify
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.train import TrainConfig, fixed_tau, hold, train

DATA = [{"input_ids": ids, "labels": ids.clone()} for ids in token_ids(3).repeat(4, 1)]
CHECKPOINTING = {"use_reentrant": False}


def adapted(name: str = "llama", **settings: Any) -> Any:
    defaults = {"tau": 0.6, "expert_size": 4, "calibration": token_ids(), "progress": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(ARCHITECTURES[name]()[0], PrunePathConfig(**{**defaults, **settings}))


def trainer(model: nn.Module, folder: Path, steps: int, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=DATA)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def router_loss(model: nn.Module) -> float:
    """What training adds to the model's loss, without dropout."""
    task = model.eval()(input_ids=token_ids(3), labels=token_ids(3)).loss
    model.base_model.training = True
    return (model(input_ids=token_ids(3), labels=token_ids(3)).loss - task).item()


def gradients(model: nn.Module) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    model.train()
    loss = model(input_ids=token_ids(3), labels=token_ids(3)).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_trainer_trains_routers_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    before, misfit = tensors(model), router_loss(model)
    trainer(model, tmp_path, steps=8, save_steps=8).train()
    assert router_loss(model) < misfit - 0.01
    changed = {key for key, value in tensors(model).items() if not torch.equal(value, before[key])}
    assert changed and all(".router." in key for key in changed)
    again = PeftModel.from_pretrained(ARCHITECTURES[name]()[0], tmp_path / "checkpoint-8")
    inputs = {"input_ids": token_ids(5)}
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_trainer_resumes_routers_and_tau(tmp_path: Path) -> None:
    whole, halves = adapted(), adapted()
    trainer(whole, tmp_path / "whole", steps=6, lr_scheduler_type="constant").train()
    trainer(halves, tmp_path / "halves", steps=3, save_steps=3, lr_scheduler_type="constant").train()
    resumed = adapted()
    set_tau(resumed, 0.123)
    trainer(resumed, tmp_path / "halves", steps=6, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
    mine, theirs = tensors(resumed), tensors(whole)
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def test_sigmoid_gates_train_by_the_task_alone() -> None:
    loss, grads = gradients(adapted(gate="sigmoid", router_loss=0.0))
    assert all(grad.any() for grad in grads)
    both, _ = gradients(adapted(gate="sigmoid", router_loss=0.5))
    assert both > loss


def test_router_loss_is_added_in_training_only() -> None:
    model = adapted()
    task = adapted(router_loss=0.0)
    batch = {"input_ids": token_ids(3), "labels": token_ids(3)}
    with torch.no_grad():
        plain = task.eval()(**batch).loss.item()
        assert model.eval()(**batch).loss.item() == plain
        assert model.train()(**batch).loss.item() == plain, "nothing to train without gradients"
    fit = model(**batch).loss.item() - plain
    assert fit > 0.1
    model.peft_config["default"].router_loss = 0.25
    assert model(**batch).loss.item() - plain == pytest.approx(0.25 * fit, rel=1e-3)
    with model.disable_adapter():
        model.train()
        assert not model(**batch).loss.requires_grad


def test_gradients_are_those_of_a_sparse_model() -> None:
    model = adapted(gate="sigmoid", router_loss=0.0)
    expected, _ = ARCHITECTURES["llama"]()
    settings = SparsifyConfig(expert_size=4, gate="sigmoid")
    sparsify(expected, 0.6, config=settings, calibration=token_ids(), progress=False)
    gradients(model), gradients(expected)
    for mine, theirs in zip(sparse_layers(model).values(), sparse_layers(expected).values(), strict=True):
        torch.testing.assert_close(mine.router.weight.grad, theirs.router.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
def test_gradient_checkpointing(gate: str) -> None:
    model = adapted(gate=gate)
    loss, grads = gradients(model)
    again = adapted(gate=gate)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    other_loss, others = gradients(again)
    assert other_loss == loss and all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_own_loop_gives_what_it_gives_on_a_sparse_model(name: str) -> None:
    """Every loss that reads weights or outputs expert by expert sees the adapter's order."""
    settings = {"task": 0.0, "contribution_fit": 1.0, "distill_ffn": 0.1, "load_balance": 0.01, "entropy": 0.01}
    recipe = TrainConfig(steps=3, phases=(fixed_tau(0.6),), train="routers", router_lr=1e-2, **settings)
    model = adapted(name)
    expected, _ = ARCHITECTURES[name]()
    sparsify(expected, 0.6, config=SparsifyConfig(expert_size=4), calibration=token_ids(), progress=False)
    mine, theirs = (train(m, [{"input_ids": token_ids(3)}], recipe, progress=False) for m in (model, expected))
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for a, b in zip(sparse_layers(model).values(), sparse_layers(expected).values(), strict=True):
        torch.testing.assert_close(a.router.weight, b.router.weight, rtol=1e-3, atol=1e-5)


def test_own_loop_holds_the_sparsity_and_trains_lora_along(tmp_path: Path) -> None:
    model = adapted(router_loss=0.0)
    lora = get_peft_model(model.get_base_model(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    before = tensors(model)
    recipe = TrainConfig(steps=30, phases=(hold(0.5),), contribution_fit=1.0, lr=1e-3)
    records = train(model, [{"input_ids": token_ids(3)}, {"input_ids": token_ids(4)}], recipe, progress=False)
    assert records[-1]["sparsity"] == pytest.approx(0.5, abs=0.08)
    changed = {key for key, value in tensors(model).items() if not torch.equal(value, before[key])}
    assert any(".router." in key for key in changed) and any(".lora_B." in key for key in changed)
    assert all(".router." in key or ".lora_" in key or key.endswith(".tau") for key in changed)
    model.save_pretrained(tmp_path / "sparse")
    lora.save_pretrained(tmp_path / "lora")
    base, inputs = ARCHITECTURES["llama"]()
    PeftModel.from_pretrained(base, tmp_path / "lora")
    again = PeftModel.from_pretrained(base, tmp_path / "sparse")
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_model_with_a_name_of_its_own_is_loaded_back(tmp_path: Path) -> None:
    ARCHITECTURES["llama"]()[0].save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PrunePathConfig(calibration=token_ids(), progress=False))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
