"""The training loop on tiny models: held sparsity, resuming, accumulation, what is trained, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from architectures import ARCHITECTURES
from tiny_llama import tiny_llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from torch_prunepath import SparsifyConfig, set_sparsity, sparse_layers, sparsify
from torch_prunepath.sparsity import measure_sparsity
from torch_prunepath.train import (
    Objective,
    Progress,
    TrainConfig,
    TrainState,
    all_experts,
    draw,
    fixed_tau,
    hold,
    ramp,
    recipes,
    train,
)
from torch_prunepath.train.batches import endless, take
from torch_prunepath.train.loop import _Run
from torch_prunepath.train.optimizer import build_optimizer

EXPERTS = SparsifyConfig(expert_size=2, partition="random", router="zero", budget="uniform")
FAST = {"lr": 3e-3, "router_lr": 3e-3, "contribution_fit": 0.1}


def model_of(name: str = "llama", **changes: Any) -> nn.Module:
    dense = tiny_llama() if name == "llama" else ARCHITECTURES[name]()[0]
    return sparsify(dense, tau=0.5, config=dataclasses.replace(EXPERTS, **changes), progress=False)


def batches(number: int = 1, rows: int = 4, length: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 90, (rows, length), generator=generator)} for _ in range(number)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("budget", [None, 6.0], ids=["uniform", "budgets"])
@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
def test_it_learns_while_sparsity_is_held(target: float, budget: float | None) -> None:
    model = model_of()
    if budget is not None:
        next(iter(sparse_layers(model).values())).budget = budget
    history = train(model, batches(), TrainConfig(steps=60, phases=(hold(target),), **FAST), progress=False)
    assert [record["step"] for record in history] == list(range(60))
    assert all(abs(record["sparsity"] - target) < 0.03 for record in history[30:])
    assert measure_sparsity(model, batches()) == pytest.approx(target, abs=0.03)
    assert history[-1]["task"] < 0.5 * history[0]["task"]


def test_one_run_for_a_range_of_sparsities() -> None:
    model = model_of()
    config = dataclasses.replace(recipes.ours(120, 0.3, 0.9), lr=3e-3, router_lr=3e-3)
    history = train(model, batches(), config, progress=False)
    late = history[60:]
    assert sum(abs(record["sparsity"] - record["target"]) for record in late) / len(late) < 0.03
    assert min(record["target"] for record in late) < 0.4 and max(record["target"] for record in late) > 0.8
    dense_loss = history[0]["task"]
    for target in (0.3, 0.6, 0.9):
        set_sparsity(model, target, batches(), tolerance=0.01, progress=False)
        assert measure_sparsity(model, batches()) == pytest.approx(target, abs=0.02)
        ids = batches()[0]["input_ids"]
        with torch.no_grad():
            assert float(model(input_ids=ids, labels=ids).loss) < 0.5 * dense_loss


def test_each_batch_of_a_step_is_held_at_its_own_target() -> None:
    model = model_of()
    config = TrainConfig(steps=60, phases=(draw(0.3, 0.9),), accumulation=3, **FAST)
    objective, optimizer = Objective(model, config, steps=60), build_optimizer(model, config)
    model.train()
    feed, seen, records = endless(batches(), 0), [], []
    for _ in range(60):
        taus = []
        for number, batch in enumerate(objective.begin(take(feed, 3))):
            objective.loss(batch).backward()
            taus.append(objective.tau)
            realised = float(objective.tape.sparsity())
            assert 0.3 + 0.2 * number - 0.1 < realised < 0.5 + 0.2 * number + 0.1 or len(seen) < 60
            seen.append(realised)
        assert taus == sorted(taus, reverse=True) and len(set(taus)) == 3
        optimizer.step()
        optimizer.zero_grad()
        records += objective.end()
    for number, record in enumerate(records[20:], 20):
        assert record["sparsity"] == pytest.approx(sum(seen[3 * number : 3 * number + 3]) / 3, abs=1e-5)
        assert record["sparsity"] == pytest.approx(record["target"], abs=0.05)


def test_stages_leave_tau_alone() -> None:
    model = model_of(rule="below", gate="sigmoid")
    config = TrainConfig(epochs=3, phases=(all_experts(), fixed_tau(0.25, 2.0)), entropy=3e-4, load_balance=1e-3)
    history = train(model, batches(2), config, progress=False)
    assert [record["tau"] for record in history] == [1.0, 1.0, 0.25, 0.25, 0.25, 0.25]
    assert history[0]["sparsity"] == 0 < history[2]["sparsity"]
    assert all("target" not in record for record in history)
    assert all(float(layer.tau) == 0.25 for layer in sparse_layers(model).values())
    assert model.config.quantization_config["layers"][0]["tau"] == 0.25


# --- resuming ---------------------------------------------------------------------------------------------------------


def resumable(name: str) -> tuple[nn.Module, TrainConfig, nn.Module | None]:
    """With dropout (GPT-2, OPT), sampled tokens, drawn targets and a teacher: everything that has a state."""
    config = TrainConfig(
        steps=8, phases=(ramp(0.2, 0.5), draw(0.3, 0.9)), accumulation=2, fit_tokens=5, distill_logits=0.5, **FAST
    )
    return model_of(name), config, ARCHITECTURES[name]()[0] if name != "llama" else tiny_llama()


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_stopping_and_resuming_changes_no_bit(name: str, stop: int) -> None:
    data = batches(3)
    model, config, teacher = resumable(name)
    whole = train(model, data, config, teacher=teacher, progress=False)
    expected = weights(model)

    model, config, teacher = resumable(name)
    state = TrainState(model, config)
    first = train(
        model, data, config, teacher=teacher, state=state, progress=False, callback=lambda s, r: s.step == stop + 1
    )
    assert state.step == stop + 1 and len(first) == stop
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "train": state.state_dict()}, file)
    torch.rand(3)  # the caller's random numbers are no part of it

    model, _, teacher = resumable(name)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model.load_state_dict(saved["model"])
    state = TrainState(model, TrainConfig.from_dict(saved["train"]["config"]))
    state.load_state_dict(saved["train"])
    second = train(model, data, state.config, teacher=teacher, state=state, progress=False)
    assert first + second == whole
    assert equal(weights(model), expected)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(model_of("gpt2"), batches(), TrainConfig(steps=2), progress=False)
    assert torch.equal(torch.rand(2), expected)


def test_another_config_does_not_resume() -> None:
    model = model_of()
    state = TrainState(model, TrainConfig(steps=3))
    other = TrainState(model, TrainConfig(steps=3, lr=1.0))
    with pytest.raises(ValueError, match=r"with lr=0.0001, not 1.0"):
        other.load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match=r"pass state.config"):
        train(model, batches(), TrainConfig(steps=4), state=state, progress=False)


# --- accumulation -----------------------------------------------------------------------------------------------------


def uneven(rows: int) -> dict[str, torch.Tensor]:
    """Rows of very different lengths, padded on the right."""
    ids = torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 12 - 3 * row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_accumulated_gradients_are_those_of_the_large_batch(name: str) -> None:
    model = model_of(name, router="centroid")
    for module in model.modules():
        for attribute in ("p", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    teacher = ARCHITECTURES[name]()[0] if name != "llama" else tiny_llama(1)
    config = TrainConfig(steps=1, entropy=1.0, contribution_fit=1.0, distill_logits=1.0, lte_separation=1e-6)
    large = uneven(4)
    pieces = [{k: v[rows] for k, v in large.items()} for rows in (slice(0, 1), slice(1, 4))]
    found = []
    for group in ([large], pieces):
        run = _Run(model, config, teacher, None, 1)
        with run.open():
            stats = run.backward(group)
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((grads, {k: float(v) for k, v in stats.items()}))
    (once, once_stats), (summed, summed_stats) = found
    assert summed_stats == pytest.approx(once_stats, rel=1e-4)
    assert once.keys() == summed.keys() and any("router" in name for name in once)
    for key in once:
        torch.testing.assert_close(summed[key], once[key], rtol=1e-3, atol=1e-4 * float(once[key].abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    """Also of what is computed inside the layers, which the backward pass does not compute again."""
    config = TrainConfig(steps=1, phases=(hold(0.5),), contribution_fit=1.0, distill_ffn=1.0, entropy=0.1, fit_tokens=9)
    found = []
    for checkpointing in (False, True):
        model = model_of(name, router="centroid")
        for module in model.modules():
            for attribute in ("p", "dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = _Run(model, config, None, None, 1)
        with run.open():
            run.backward([uneven(3)])
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and any("router" in name for name in plain)
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, msg=key)


def test_what_is_computed_beside_a_layer_takes_no_gradient_from_it() -> None:
    """Under autocast torch keeps the weights it has cast: one that was cast without gradient must not come back."""
    model = model_of(router="centroid")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda *_: None)  # now the module itself computes, in autocast's own way
    found = []
    for fit in (0.0, 1e-9):
        model.zero_grad()
        run = _Run(model, TrainConfig(steps=1, phases=(hold(0.5),), autocast=True, contribution_fit=fit), None, None, 1)
        with run.open():
            run.backward(batches())
            found.append(mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-6)
    assert bool(found[0].any())


# --- a loop of one's own ----------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes operators whose result, or its shape, the host has to wait for where tensors are on a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name.startswith(self.NAMES) or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device() -> None:
    model, teacher = model_of(), tiny_llama(1)
    config = TrainConfig(
        steps=3, entropy=1.0, load_balance=1.0, lte_separation=1e-6, distill_logits=1.0, distill_ffn=1.0, **FAST
    )
    objective = Objective(model, config, 3, teacher=teacher)
    model.train()
    data = [{**uneven(4), "labels": uneven(4)["input_ids"]}]
    batch = objective.begin(data)[0]
    objective.loss(batch).backward()
    objective.end()
    # What the model itself asks for (transformers looks at the mask) is not this library's.
    with Waits() as own:
        model(**batch)
        teacher(**{k: v for k, v in batch.items() if k != "labels"})
    assert "nonzero" not in own.seen
    with Waits() as waits:
        batch = objective.begin(data)[0]
        objective.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        objective.end()
    assert len(waits.seen) <= len(own.seen), (waits.seen, own.seen)
    with Waits() as waits:
        assert bool(torch.ones(2).nonzero().any())
    assert "nonzero" in waits.seen and len(waits.seen) == 2  # it does notice


def test_ones_own_loop_does_what_train_does() -> None:
    config = TrainConfig(
        steps=6, phases=(draw(0.3, 0.9),), accumulation=2, warmup=0.0, decay="constant", clip=None, **FAST
    )
    expected = model_of()
    history = train(expected, batches(4), config, progress=False)
    model = model_of()
    model.train()
    objective, optimizer = Objective(model, config, steps=6), build_optimizer(model, config)
    feed, records = endless(batches(4), 0), []
    for _ in range(6):
        for batch in objective.begin(take(feed, 2)):
            objective.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        records += objective.end()
        progress = Progress(config)  # as if it had been saved and loaded between any two steps
        progress.load_state_dict(json.loads(json.dumps(objective.progress.state_dict())))
        objective.progress = progress
    records += objective.progress.finished(keep=0)
    assert equal(weights(model), weights(expected))
    assert records == [{k: v for k, v in record.items() if k != "lr"} for record in history]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_with_accelerate(precision: str) -> None:
    """The loop of the documentation."""
    AcceleratorState._reset_state(True)
    config = TrainConfig(steps=40, phases=(hold(0.6),), **FAST)
    bare = model_of()
    optimizer = build_optimizer(bare, config)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    loader = torch.utils.data.DataLoader([row for b in batches(2) for row in b["input_ids"]], batch_size=4)
    model, optimizer, loader = accelerator.prepare(bare, optimizer, loader)
    objective = Objective(model, config, steps=40)
    feed, records = endless([{"input_ids": ids} for ids in loader], 0), []
    model.train()
    for _ in range(40):
        group = objective.begin(take(feed, 2))
        for batch in group:
            with contextlib.nullcontext() if batch is group[-1] else accelerator.no_sync(model):
                accelerator.backward(objective.loss(batch))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        records += objective.end()
    assert records[-1]["task"] < 0.7 * records[0]["task"]
    assert all(abs(record["sparsity"] - 0.6) < 0.05 for record in records[20:])
    AcceleratorState._reset_state(True)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_router_only_training_leaves_the_trunk_bit_identical(name: str) -> None:
    model = model_of(name)
    before = weights(model)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    config = TrainConfig(steps=30, train="routers", task=0.0, contribution_fit=1.0, router_lr=1e-2, clip=None)
    asked: list[set[str]] = []  # which parameters a backward pass is for

    def note(state: TrainState, record: dict[str, float]) -> None:
        asked.append({n for n, p in model.named_parameters() if p.requires_grad})

    history = train(model, batches(), config, progress=False, callback=note)
    assert all(".router." in n for names in asked for n in names) and asked[0]
    after = weights(model)
    for key in before:
        assert torch.equal(before[key], after[key]) != (".router." in key), key
    assert history[-1]["contribution_fit"] < history[0]["contribution_fit"] - 0.01
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


def test_gated_routers_learn_from_the_task_alone() -> None:
    model = model_of(gate="sigmoid")
    before = weights(model)
    history = train(model, batches(), TrainConfig(steps=20, train="routers", router_lr=3e-2), progress=False)
    assert history[-1]["task"] < history[0]["task"]
    assert all(torch.equal(v, before[k]) != (".router." in k) for k, v in weights(model).items())


def test_frozen_parameters_stay_frozen_and_modes_come_back() -> None:
    model = model_of("gpt2")
    model.requires_grad_(False)
    layer = next(iter(sparse_layers(model).values()))
    layer.requires_grad_(True)
    layer.train()
    modes = [module.training for module in model.modules()]
    before = weights(model)
    train(model, batches(), TrainConfig(steps=2, **FAST), progress=False)
    changed = {key for key, value in weights(model).items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(layer.name) for key in changed)
    assert [module.training for module in model.modules()] == modes


def test_learning_rates_go_to_their_groups() -> None:
    config = TrainConfig(steps=4, lr=1e-3, router_lr=2e-3, norm_lr=3e-3, weight_decay=0.5)
    model = model_of("opt")
    groups = TrainState(model, config).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert seen.keys() == {name for name, _ in model.named_parameters()}
    for name, values in seen.items():
        lr = 2e-3 if ".router." in name else 3e-3 if "norm" in name else 1e-3
        assert values == (lr, 0.5 if name.endswith("weight") and "norm" not in name else 0.0), name


def test_checkpointing_autocast_and_ffn_distillation_run_together() -> None:
    model = model_of()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = TrainConfig(steps=40, phases=(hold(0.6),), autocast=True, distill_ffn=0.1, **FAST)
    history = train(model, batches(), config, progress=False)
    assert history[-1]["task"] < 0.7 * history[0]["task"]
    assert history[-1]["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_teacher_pulls_the_student_towards_it() -> None:
    model, teacher = model_of(), tiny_llama()
    config = TrainConfig(steps=60, phases=(hold(0.5),), task=0.0, distill_logits=1.0, temperature=2.0, **FAST)
    before = weights(teacher)
    history = train(model, batches(), config, teacher=teacher, progress=False)
    assert history[-1]["distill_logits"] < 0.3 * max(record["distill_logits"] for record in history)
    assert equal(weights(teacher), before) and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_other_models_train_with_their_own_labels(name: str) -> None:
    model = model_of(name)
    ids = batches()[0]["input_ids"]
    teacher = ARCHITECTURES[name]()[0]
    for config in (model.config, teacher.config):
        config.decoder_start_token_id = 0
    config = TrainConfig(steps=20, phases=(hold(0.4),), distill_logits=0.1, **FAST)
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    history = train(model, data, config, teacher=teacher, progress=False)
    assert history[-1]["task"] < history[0]["task"]


# --- several processes ------------------------------------------------------------------------------------------------


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = model_of()
    config = TrainConfig(steps=12, phases=(ramp(0.3, 0.9),), **FAST)
    history = train(DistributedDataParallel(model), batches(2, seed=rank), config, progress=False)
    told = model.config.quantization_config["layers"][0]["tau"]
    grads = {across: _uneven_gradients(rank, across) for across in (False, True)}
    found = {"weights": model.state_dict(), "history": history, "tau": told, "grads": grads}
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def _uneven_gradients(rank: int, across: bool) -> dict[str, torch.Tensor]:
    """Of a step in which the first process has one row of text, and the second two batches of padded ones."""
    model = model_of(router="centroid")
    wrapped = DistributedDataParallel(model)
    objective = Objective(wrapped, UNEVEN, 1, across_processes=across)
    for number, batch in enumerate(objective.begin(_parts()[rank])):
        with wrapped.no_sync() if rank == 1 and number == 0 else contextlib.nullcontext():
            objective.loss(batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _parts() -> list[list[dict[str, torch.Tensor]]]:
    one, two, three = ({k: v[row : row + 1] for k, v in uneven(3).items()} for row in range(3))
    return [[one], [two, three]]


UNEVEN = TrainConfig(steps=1, phases=(hold(0.5),), contribution_fit=1.0, entropy=1.0, fit_tokens=10**6)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(_one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("across", [False, True], ids=["processes_alike", "tokens_alike"])
def test_what_processes_with_different_numbers_of_tokens_count(two: list[dict[str, Any]], across: bool) -> None:
    groups = [[batch for part in _parts() for batch in part]] if across else _parts()
    expected: dict[str, torch.Tensor] = {}
    for group in groups:
        run = _Run(model_of(router="centroid"), UNEVEN, None, None, 1)
        with run.open():
            run.backward(group)
            for name, p in run.model.named_parameters():
                expected[name] = expected.get(name, 0) + p.grad / len(groups)
    for key, value in expected.items():
        close = {"rtol": 1e-3, "atol": 1e-4 * float(value.abs().max()) + 1e-7}
        torch.testing.assert_close(two[0]["grads"][across][key], value, **close)


def test_two_processes_stay_together(two: list[dict[str, Any]]) -> None:
    first, second = two
    assert equal(first["weights"], second["weights"]) and first["history"] == second["history"]
    assert first["tau"] == pytest.approx(first["history"][-1]["tau"])
    # One process that accumulates both processes' batches does the same, but for rounding.
    both = [batch for pair in zip(batches(2, seed=0), batches(2, seed=1), strict=True) for batch in pair]
    config = TrainConfig(steps=12, phases=(ramp(0.3, 0.9),), accumulation=2, **FAST)
    alone = train(model_of(), both, config, progress=False)
    for one, two in zip(alone, first["history"], strict=True):
        assert two == pytest.approx(one, rel=1e-2)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ({"steps": 5}, iter(batches(2)), "ended after 2"),
        ({"steps": 5}, [], "ended after 0"),
        ({"epochs": 1.0}, iter(batches(2)), "epochs= needs batches whose number is known"),
        ({"steps": 1}, [torch.zeros(2, 3)], "wrap it in a collator"),
        ({"steps": 1}, [{"inputs_embeds": torch.zeros(1, 3, 32)}], "no 'labels'"),
        ({"steps": 1, "distill_logits": 1.0}, batches(), "pass teacher="),
        ({"steps": 1, "train": "routers"}, batches(), "nothing trains the routers"),
    ],
    ids=["generator", "empty", "unsized", "tensor", "no_labels", "no_teacher", "untrained"],
)
def test_what_does_not_fit_is_refused_with_a_remedy(fields: dict, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model_of(), data, TrainConfig(**fields), progress=False)


def test_a_teacher_of_no_use_and_a_dense_model_are_refused() -> None:
    with pytest.raises(ValueError, match="distill_logits is 0"):
        train(model_of(), batches(), TrainConfig(steps=1), teacher=tiny_llama(), progress=False)
    with pytest.raises(ValueError, match="sparsify"):
        train(tiny_llama(), batches(), TrainConfig(steps=1), progress=False)
    with pytest.raises(ValueError, match="unfreeze"):
        train(model_of().requires_grad_(False), batches(), TrainConfig(steps=1), progress=False)


def test_a_run_that_blows_up_stops() -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rates"):
        config = TrainConfig(steps=50, lr=1e30, warmup=0.0, clip=None, decay="constant")
        train(model_of(), batches(), config, progress=False)


def test_progress_shows_loss_sparsity_and_tau(capsys: pytest.CaptureFixture[str]) -> None:
    train(model_of(), batches(), TrainConfig(steps=3, phases=(hold(0.5),)))
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("training", "3/3", "loss=", "sparsity=", "tau="))
