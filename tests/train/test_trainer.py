"""``PrunePathTrainer``: it trains as ``train()`` does, resumes to the same bits, logs, evaluates, and saves."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_llama import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from torch_prunepath import SparsifyConfig, sparse_layers, sparsify
from torch_prunepath.sparsity import measure_sparsity
from torch_prunepath.train import (
    PrunePathTrainer,
    TrainConfig,
    all_experts,
    draw,
    fixed_tau,
    hold,
    ramp,
    recipes,
    train,
    trainer_arguments,
)

EXPERTS = SparsifyConfig(expert_size=2, partition="random", router="centroid", budget="uniform")
PLAIN = TrainConfig(
    steps=8,
    phases=(ramp(0.2, 0.5), draw(0.3, 0.9)),
    lr=3e-3,
    router_lr=1e-2,
    warmup=0.0,
    decay="constant",
    accumulation=2,
    entropy=0.01,
    load_balance=0.01,
    contribution_fit=0.1,
    fit_tokens=7,
)


def sparse(name: str = "llama", **changes: Any) -> nn.Module:
    dense = tiny_llama() if name == "llama" else ARCHITECTURES[name]()[0]
    return sparsify(dense, tau=0.5, config=dataclasses.replace(EXPERTS, **changes), progress=False)


def rows(number: int = 8, length: int = 12, padded: bool = True) -> list[dict[str, torch.Tensor]]:
    """Of very different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(number):
        ids = torch.randint(3, 90, (length,), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[length - 2 * (row % 5) :] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


class InOrder(PrunePathTrainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, config: TrainConfig, **changes: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **trainer_arguments(config),
        **changes,
    }
    return TrainingArguments(str(folder), **settings)


def trainer(folder: Path, config: TrainConfig, model: nn.Module, **changes: Any) -> InOrder:
    own = {key: changes.pop(key) for key in ("teacher", "eval_dataset", "train_dataset", "compile") if key in changes}
    return InOrder(model, arguments(folder, config, **changes), config=config, **{"train_dataset": rows(), **own})


def collated(data: list[dict[str, torch.Tensor]], size: int = 2) -> list[dict[str, torch.Tensor]]:
    return [
        {key: torch.stack([row[key] for row in data[start : start + size]]) for key in data[0]}
        for start in range(0, len(data), size)
    ]


def train_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses_of(run: InOrder) -> list[float]:
    run.train()
    return [entry["loss"] for entry in train_logs(run)]


def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    eager, compiled = sparse(), sparse()
    expected = losses_of(trainer(tmp_path / "eager", PLAIN, eager))
    assert losses_of(trainer(tmp_path / "compiled", PLAIN, compiled, compile="aot_eager")) == pytest.approx(expected)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, msg=name)


@pytest.mark.gpu
def test_gradients_add_up_outside_of_cuda_graphs(tmp_path: Path) -> None:
    runs = [("eager", False), ("graphs", "reduce-overhead")]
    found = [losses_of(trainer(tmp_path / n, PLAIN, sparse(), use_cpu=False, compile=how)) for n, how in runs]
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_it_trains_as_train_does(tmp_path: Path, checkpointing: bool) -> None:
    expected, model, teacher = sparse(), sparse(), tiny_llama(1)
    config = dataclasses.replace(PLAIN, distill_logits=0.5, distill_ffn=0.1, norm_lr=1e-3)
    history = train(expected, collated(rows()), config, teacher=tiny_llama(1), progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(tmp_path, config, model, teacher=teacher, gradient_checkpointing=checkpointing)
    run.train()
    logs = train_logs(run)
    assert [entry["step"] for entry in logs] == list(range(1, 9))
    for entry, record in zip(logs, history, strict=True):
        for name in (*config.losses, "loss", "sparsity", "tau", "target"):
            assert entry[name] == pytest.approx(record[name], rel=2e-3, abs=1e-6), name
    for key, value in expected.state_dict().items():
        change, error = (value - before[key]).float().norm(), (value - model.state_dict()[key]).float().norm()
        assert error <= 0.05 * change + 1e-7, key


def test_the_optimizer_has_the_groups_of_train(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, norm_lr=1e-3, weight_decay=0.5)
    run = trainer(tmp_path, config, sparse(), adam_beta2=0.95)
    groups = run.create_optimizer().param_groups
    names = {id(p): name for name, p in run.model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, _ in run.model.named_parameters()}
    for name, values in found.items():
        lr = 1e-2 if ".router." in name else 1e-3 if "norm" in name else 3e-3
        assert values == (lr, 0.0 if "norm" in name or name.endswith("bias") else 0.5), name
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resuming_changes_no_bit(tmp_path: Path, name: str) -> None:
    """With dropout (GPT-2), sampled tokens and drawn targets; at a step that the controller has not seen the end of."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", PLAIN, sparse(name), **settings)
    whole.train()
    again = trainer(tmp_path / "again", PLAIN, sparse(name), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert [entry["tau"] for entry in train_logs(again)] == [entry["tau"] for entry in train_logs(whole)]
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_logging_rarely_trains_the_same(tmp_path: Path) -> None:
    often, rarely = (trainer(tmp_path, PLAIN, sparse(), logging_steps=steps) for steps in (1, 4))
    often.train()
    rarely.train()
    theirs = rarely.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in often.model.state_dict().items())
    logs = train_logs(often)
    for number, entry in enumerate(train_logs(rarely)):
        for name in ("sparsity", "tau", "task", "contribution_fit"):
            mean = sum(log[name] for log in logs[4 * number : 4 * number + 4]) / 4
            assert entry[name] == pytest.approx(mean, rel=1e-6), name


def test_evaluation_and_checkpoints_are_at_the_held_sparsity(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, steps=40, phases=(draw(0.4, 0.8),), accumulation=1)
    data = rows(4)
    run = trainer(tmp_path, config, sparse(), train_dataset=data, eval_dataset=data, per_device_train_batch_size=4)
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_sparsity"] == pytest.approx(0.6, abs=0.05)
    inputs = {key: value for key, value in collated(data, 4)[0].items()}
    assert measure_sparsity(run.model, [inputs]) == pytest.approx(metrics["eval_sparsity"], abs=1e-5)
    with torch.no_grad():
        assert float(run.model(**inputs).loss) == pytest.approx(metrics["eval_loss"], rel=1e-4)
    run.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert measure_sparsity(again, [inputs]) == pytest.approx(metrics["eval_sparsity"], abs=1e-5)
    assert [float(layer.tau) for layer in sparse_layers(again).values()] == pytest.approx([metrics["eval_tau"]] * 2)


def test_evaluating_in_between_does_not_change_training(tmp_path: Path) -> None:
    plain = trainer(tmp_path, PLAIN, sparse())
    plain.train()
    run = trainer(tmp_path, PLAIN, sparse(), eval_dataset=rows(3), eval_strategy="steps", eval_steps=2)
    run.train()
    assert len([entry for entry in run.state.log_history if "eval_sparsity" in entry]) == 4
    theirs = run.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in plain.model.state_dict().items())


def test_the_paper_stages_and_a_checkpoint_in_each(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, phases=(all_experts(), fixed_tau(0.25)), entropy=1e-3, warmup=0.0, decay="linear")
    run = trainer(tmp_path, config, sparse(gate="sigmoid"), save_strategy="steps", save_steps=2)
    run.train()
    assert [entry["tau"] for entry in train_logs(run)] == [1.0] * 4 + [0.25] * 4
    assert float(next(iter(sparse_layers(run.model).values())).tau) == 0.25
    saved = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())["quantization_config"]
    assert saved["layers"][0]["tau"] == 0.25


def test_labels_come_from_the_tokens_of_a_causal_model(tmp_path: Path) -> None:
    with_labels = trainer(tmp_path, PLAIN, sparse(), eval_dataset=rows())
    bare = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows()]
    without = trainer(tmp_path, PLAIN, sparse(), train_dataset=bare, eval_dataset=bare)
    for run in (with_labels, without):
        run.train()
    assert without.evaluate()["eval_loss"] == pytest.approx(with_labels.evaluate()["eval_loss"], rel=1e-5)


def test_bf16_routers_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(
        PLAIN, steps=20, phases=(hold(0.6),), autocast=True, train="routers", task=0.0, contribution_fit=1.0
    )
    model = sparse(router="zero")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(tmp_path, config, model)
    run.train()
    after = run.model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {k for k in before if ".router." in k}
    logs = train_logs(run)
    assert logs[-1]["contribution_fit"] < logs[0]["contribution_fit"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in run.model.parameters())


def test_padding_does_not_count_in_bf16(tmp_path: Path) -> None:
    found = []
    for extra in (0, 6):
        data = [
            {k: nn.functional.pad(v, (0, extra), value=-100 if k == "labels" else 0) for k, v in row.items()}
            for row in rows()
        ]
        config = dataclasses.replace(PLAIN, steps=1, autocast=True, fit_tokens=10**6, phases=(hold(0.5),))
        run = trainer(tmp_path, config, sparse(), train_dataset=data)
        run.train()
        found.append({name: train_logs(run)[0][name] for name in (*config.losses, "sparsity")})
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def test_recipes_and_arguments_agree(tmp_path: Path) -> None:
    for config in (recipes.ours(10), recipes.held(10, 0.7), recipes.paper()):
        run = trainer(tmp_path, config, sparse())
        assert run.train_config == dataclasses.replace(config, warmup=run.train_config.warmup)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"lr": 2e-4}, {"learning_rate": 1e-3}, r"lr=0.0002, but TrainingArguments learning_rate=0.001"),
        ({"steps": 4}, {"max_steps": -1}, r"steps=4, but TrainingArguments max_steps=-1"),
        ({"steps": 4}, {"max_steps": 5}, r"steps=4, but TrainingArguments max_steps=5"),
        ({"accumulation": 2}, {"gradient_accumulation_steps": 1}, r"accumulation=2"),
        ({"autocast": True}, {"bf16": False}, r"autocast=True, but TrainingArguments bf16=False"),
        ({"clip": None}, {"max_grad_norm": 1.0}, r"clip=None"),
        ({"decay": "linear"}, {"lr_scheduler_type": "cosine"}, r"decay='linear'"),
        ({"seed": 3}, {"seed": 4}, r"seed=3"),
        ({}, {"label_smoothing_factor": 0.1}, "does not smooth labels"),
        ({}, {"ddp_find_unused_parameters": True}, "leave ddp_find_unused_parameters unset"),
        ({}, {"torch_compile": True}, "pass compile=True to PrunePathTrainer"),
        ({"distill_logits": 1.0}, {}, "pass teacher="),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, fields: dict, changes: dict, message: str) -> None:
    config = TrainConfig(**{"steps": 4, **fields})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, config, sparse(), **changes).train()


def test_what_the_config_leaves_open_the_arguments_decide(tmp_path: Path) -> None:
    args = arguments(tmp_path, TrainConfig(steps=3), learning_rate=7e-4, seed=9, lr_scheduler_type="polynomial")
    run = PrunePathTrainer(sparse(), args, config=TrainConfig(steps=3), train_dataset=rows())
    assert (run.train_config.lr, run.train_config.seed) == (7e-4, 9)
    assert run.create_optimizer().param_groups[0]["lr"] == 7e-4


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsify"):
        trainer(tmp_path, PLAIN, tiny_llama())
    with pytest.raises(ValueError, match="model_init"):
        PrunePathTrainer(sparse(), arguments(tmp_path, PLAIN), config=PLAIN, model_init=sparse)
    own = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": [], "lr": 1.0})}
    with pytest.raises(ValueError, match="adamw_torch"):
        PrunePathTrainer(sparse(), arguments(tmp_path, PLAIN), config=PLAIN, **own).create_optimizer()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, PLAIN, save_strategy="steps", save_steps=4)
    Trainer(sparse(), args, train_dataset=rows()).train()
    run = trainer(tmp_path, PLAIN, sparse())
    with pytest.raises(ValueError, match="start anew"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, steps=50, lr=1e30, clip=None)
    with pytest.raises(FloatingPointError, match="lower the learning rates"):
        trainer(tmp_path, config, sparse()).train()


def test_importing_train_does_not_import_the_trainer() -> None:
    code = (
        "import sys, torch_prunepath.train as t\n"
        "assert 'transformers.trainer' not in sys.modules\n"
        "assert t.PrunePathTrainer.__name__ == 'PrunePathTrainer'\n"
        "assert 'transformers.trainer' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
