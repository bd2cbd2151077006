"""FSDP2: two processes that each hold half of every weight train as one process does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from tiny_llama import tiny_llama
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from torch_prunepath import SparsifyConfig, sparsify
from torch_prunepath.train import TrainConfig, contiguous, ramp, train

EXPERTS = SparsifyConfig(expert_size=2, partition="random", router="centroid", budget="uniform")
EVERYTHING = TrainConfig(
    steps=8,
    phases=(ramp(0.3, 0.9),),
    lr=3e-3,
    router_lr=3e-3,
    accumulation=2,
    entropy=0.01,
    load_balance=0.01,
    contribution_fit=0.5,
    distill_ffn=0.1,
    distill_logits=0.5,
    fit_tokens=24,  # every token: which are sampled depends on the batch's number in the step, as drawn targets do
)


def dense(name: str) -> nn.Module:
    if name == "llama":
        return tiny_llama()
    model, _ = ARCHITECTURES[name]()
    for module in model.modules():
        for attribute in ("p", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def sparse(name: str, **changes: Any) -> nn.Module:
    return sparsify(dense(name), tau=0.5, config=dataclasses.replace(EXPERTS, **changes), progress=False)


def shard(model: nn.Module, block: str) -> nn.Module:
    """Each block by itself, then what is left."""
    contiguous(model)
    for module in list(model.modules()):
        if type(module).__name__.startswith(block):
            fully_shard(module)
    fully_shard(model)
    return model


def batches(rank: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(rank)
    return [{"input_ids": torch.randint(3, 90, (2, 12), generator=generator)} for _ in range(4)]


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


BLOCKS = {"llama": "LlamaDecoderLayer", "llama_by_ffn": "SparseFFN", "opt": "OPTDecoderLayer"}


def train_sharded(case: str, rank: int) -> dict[str, Any]:
    name = case.partition("_")[0]
    model = shard(sparse(name), BLOCKS[case])
    assert any(type(module).__name__.startswith("FSDP") for module in model.modules() if module is not model)
    history = train(model, batches(rank), EVERYTHING, teacher=dense(name), progress=False)
    return {"weights": whole(model), "history": history}


def train_routers(rank: int) -> dict[str, Any]:
    model = shard(sparse("llama", gate="sigmoid"), BLOCKS["llama"])
    config = dataclasses.replace(EVERYTHING, train="routers", distill_logits=0.0)
    history = train(model, batches(rank), config, progress=False)
    return {"weights": whole(model), "history": history}


def refusals(rank: int) -> list[str]:
    messages = []
    for fields, gate in (({"train": "routers"}, "one"), ({"task": 0.0}, "sigmoid")):
        model = shard(sparse("llama", gate=gate), BLOCKS["llama"])
        try:
            train(model, batches(rank), TrainConfig(steps=1, contribution_fit=1.0, **fields), progress=False)
        except ValueError as error:
            messages.append(str(error))
    return messages


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {case: train_sharded(case, rank) for case in BLOCKS}
    torch.save({**found, "routers": train_routers(rank), "refusals": refusals(rank)}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; started once, because starting takes the longest."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", BLOCKS)
def test_two_shards_train_as_one_process(results: list[dict[str, Any]], case: str) -> None:
    name = case.partition("_")[0]
    first, second = (result[case] for result in results)
    assert first["history"] == second["history"]
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    # One process that takes both processes' batches: in each step, two of each.
    mine, theirs = batches(0), batches(1)
    both = [batch for i in (0, 2) for pair in zip(mine[i : i + 2], theirs[i : i + 2], strict=True) for batch in pair]
    model = sparse(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    alone = train(model, both, dataclasses.replace(EVERYTHING, accumulation=4), teacher=dense(name), progress=False)
    for one, two in zip(alone, first["history"], strict=True):
        assert two == pytest.approx(one, rel=1e-2)
    moved = 0
    for key, value in model.state_dict().items():
        assert first["weights"][key].shape == value.shape
        if key.endswith("k_proj.bias"):  # attention does not see it: Adam makes steps of the gradient's rounding
            continue
        change, error = (value - before[key]).float().norm(), (value - first["weights"][key]).float().norm()
        assert error <= 0.05 * change + 1e-6, key
        moved += bool(change > 0)
    assert moved > len(before) // 2


def test_routers_alone_train_where_their_gates_reach_the_output(results: list[dict[str, Any]]) -> None:
    first, second = (result["routers"] for result in results)
    assert first["history"] == second["history"]
    before = sparse("llama", gate="sigmoid").state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, first["weights"][key])}
    assert changed == {key for key in before if ".router." in key}


def test_what_fsdp2_would_not_train_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert len(result["refusals"]) == 2
        assert all("use DistributedDataParallel" in message for message in result["refusals"])


def test_contiguous_changes_no_value() -> None:
    model = sparse("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    assert contiguous(model) is model
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
