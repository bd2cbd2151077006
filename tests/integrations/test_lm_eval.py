from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api import registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_tasks import TINY, isolate, write_tiny_tasks
from peft import LoraConfig, get_peft_model
from tiny_llama import byte_tokenizer, save_tiny_llama, tiny_llama
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import torch_prunepath
from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, set_thresholds
from torch_prunepath.commands.sweep.scores import scores_of
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation import lm_eval as harness
from torch_prunepath.evaluation.make_sparse import model_tau
from torch_prunepath.integrations.lm_eval import PrunePathLM, first_where
from torch_prunepath.integrations.peft import PrunePathConfig

FAST = {"expert_size": 4, "partition": "random", "router": "zero", "budget": "uniform"}
SPARSE = SparsifyConfig(expert_size=5, partition="random", router="centroid", budget="uniform")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def manager(tasks: Path) -> TaskManager:
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    torch_prunepath.sparsify(tiny_llama(), tau=0.6, config=SPARSE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def evaluate(lm: Any, manager: TaskManager, *names: str) -> dict[str, Any]:
    results = simple_evaluate(model=lm, tasks=list(names or TINY), task_manager=manager, bootstrap_iters=0)
    assert results is not None
    return results


def answers(results: dict[str, Any]) -> list[Any]:
    """Every log-likelihood and text that the model gave, in order."""
    return [sample["filtered_resps"] for task in TINY for sample in results["samples"][task]]


def assert_same_scores(found: dict[str, Any], expected: dict[str, Any]) -> None:
    mine, theirs = scores_of(found), scores_of(expected)
    assert {task: set(scores) for task, scores in mine.items()} == {
        task: set(scores) for task, scores in theirs.items()
    }
    for task, scores in theirs.items():
        for metric, score in scores.items():
            assert mine[task][metric]["value"] == pytest.approx(score["value"], rel=1e-5), (task, metric)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same_scores(found, expected)
    for ours, stock in zip(answers(found), answers(expected), strict=True):
        for a, b in zip(ours, stock, strict=True):
            assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-5)), (ours, stock)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tau_1_scores_as_hf_does(dense: Path, manager: TaskManager, batch_size: int) -> None:
    stock = evaluate(HFLM(pretrained=str(dense), device="cpu", batch_size=batch_size), manager)
    lm = PrunePathLM(pretrained=str(dense), tau=1, device="cpu", batch_size=batch_size, **FAST)
    ours = evaluate(lm, manager)
    assert_same(ours, stock)
    assert ours["config"]["prunepath"]["sparsity"] == 0
    assert ours["config"]["model_num_parameters"] > stock["config"]["model_num_parameters"]
    set_tau(lm.model, 0.2)
    lm.reset_sparsity()
    sparser = evaluate(lm, manager)
    assert answers(sparser) != answers(ours)
    assert sparser["config"]["prunepath"]["sparsity"] > 0.5


def test_a_checkpoint_keeps_its_tau(sparse: Path, manager: TaskManager) -> None:
    found = evaluate(PrunePathLM(pretrained=sparse, device="cpu"), manager)["config"]["prunepath"]
    assert found["tau"] == 0.6
    assert set(found["tau_per_layer"]) == set(found["sparsity_per_layer"]) == {f"model.layers.{i}.mlp" for i in (0, 1)}
    assert found["tau_per_layer"]["model.layers.0.mlp"] == pytest.approx(0.6)
    assert found["sparsity"] == pytest.approx(sum(found["sparsity_per_layer"].values()) / 2)
    assert 0.1 < found["sparsity"] < 0.9
    lower = evaluate(PrunePathLM(pretrained=str(sparse), tau=0.3, device="cpu"), manager)["config"]["prunepath"]
    assert lower["tau"] == 0.3
    assert lower["sparsity"] > found["sparsity"]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_sparsity_is_searched_for(request: pytest.FixtureRequest, manager: TaskManager, kind: str) -> None:
    settings = {"expert_size": 2, "calibration_tokens": 2048} if kind == "dense" else {}
    lm = PrunePathLM(pretrained=str(request.getfixturevalue(kind)), sparsity=0.4, device="cpu", **settings)
    found = evaluate(lm, manager)["config"]["prunepath"]
    assert found["target_sparsity"] == 0.4
    assert found["sparsity"] == pytest.approx(0.4, abs=0.1)
    assert found["tau"] == pytest.approx(model_tau(lm.model))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_bytes_are_reached(request: pytest.FixtureRequest, manager: TaskManager, kind: str) -> None:
    settings = {"expert_size": 8, "calibration_tokens": 2048} if kind == "dense" else {}
    lm = PrunePathLM(pretrained=str(request.getfixturevalue(kind)), bytes="0.6", device="cpu", **settings)
    found = evaluate(lm, manager)["config"]["prunepath"]
    assert (found["target_bytes"], found["target_sparsity"], found["tau"]) == (0.6, None, None)
    assert found["bytes"] == pytest.approx(0.6, abs=0.1)
    assert found["sparsity"] < 0.4, "the rest are inputs and neurons"
    assert found["calibration_tokens"] > 0
    for name, layer in torch_prunepath.sparse_layers(lm.model).items():
        assert found["tau_per_layer"][name] == float(layer.tau)
        assert found["theta_x_per_layer"][name] == float(layer.theta_x)
        assert found["theta_h_per_layer"][name] == float(layer.theta_h)
        assert 0.3 < found["bytes_per_layer"][name] < 0.9
    again = PrunePathLM(pretrained=lm.model, tokenizer=byte_tokenizer(), bytes=0.5)
    assert again.sparsity_info()["calibration_tokens"] == 0, "along the path that is there"
    assert evaluate(again, manager)["config"]["prunepath"]["bytes"] == pytest.approx(0.5, abs=0.1)


def test_bytes_read_are_those_of_record_sparsity(manager: TaskManager) -> None:
    """One row at a time there is no padding: then everything that ran counts. Before, between and after thresholds."""
    model = sparse_llama()
    lm = PrunePathLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=120, batch_size=1)
    for thresholds in ({}, {"inputs": 0.4}, {"inputs": 0.2, "neurons": 0.3}, {"inputs": 0.0, "neurons": 0.0}):
        if thresholds:
            set_thresholds(model, **thresholds)
        lm.reset_sparsity()
        with record_sparsity(model) as record:
            evaluate(lm, manager)
        found = lm.sparsity_info()
        assert found["bytes"] == pytest.approx(record.shares.bytes, rel=1e-9)
        for name, shares in record.shares_per_layer.items():
            assert found["bytes_per_layer"][name] == pytest.approx(shares.bytes, rel=1e-9)


@pytest.mark.parametrize("make", ["sparse_llama", "sparse_opt"])
def test_bytes_read_do_not_depend_on_the_batch(make: str, manager: TaskManager) -> None:
    read = []
    for batch_size in (1, 4):
        model = globals()[make]()
        set_thresholds(model, inputs=0.1, neurons=0.1)
        lm = PrunePathLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=120, batch_size=batch_size)
        evaluate(lm, manager)
        read.append(lm.sparsity_info()["bytes"])
    assert read[1] == pytest.approx(read[0], rel=5e-3) and 0.1 < read[0] < 0.9


def test_a_call_that_came_to_no_end_does_not_count(manager: TaskManager) -> None:
    model = sparse_llama()
    set_thresholds(model, inputs=0.1, neurons=0.1)
    lm = PrunePathLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2)
    expected = evaluate(lm, manager)["config"]["prunepath"]["bytes"]
    lm.reset_sparsity()
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda *_: 1 / 0)
    mlp = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm._model_call(torch.zeros(1, 4, dtype=torch.int64))
    handle.remove()
    mlp.remove()
    assert evaluate(lm, manager)["config"]["prunepath"]["bytes"] == pytest.approx(expected, rel=1e-9)


def test_a_model_in_memory(manager: TaskManager) -> None:
    model = torch_prunepath.sparsify(tiny_llama(), tau=0.5, config=SPARSE)
    lm = PrunePathLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2)
    assert evaluate(lm, manager)["config"]["prunepath"]["tau"] == 0.5


def test_an_adapter_is_merged_before_neurons_move(dense: Path, tmp_path: Path, manager: TaskManager) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False, r=4)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    stock = evaluate(HFLM(pretrained=str(dense), peft=str(tmp_path), device="cpu"), manager)
    plain = evaluate(HFLM(pretrained=str(dense), device="cpu"), manager)
    lm = PrunePathLM(pretrained=str(dense), peft=str(tmp_path), tau=1.0, device="cpu", **FAST)
    assert answers(stock) != answers(plain)
    assert_same(evaluate(lm, manager), stock)


def test_an_adapter_on_a_sparse_checkpoint_stays(sparse: Path, tmp_path: Path, manager: TaskManager) -> None:
    torch.manual_seed(0)
    model = torch_prunepath.load(sparse)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path)
    lm = PrunePathLM(pretrained=str(sparse), peft=str(tmp_path), device="cpu", batch_size=2)
    results = evaluate(lm, manager)
    assert answers(results) != answers(evaluate(PrunePathLM(pretrained=str(sparse), device="cpu"), manager))
    assert results["config"]["prunepath"]["tau"] == 0.6
    assert 0.1 < results["config"]["prunepath"]["sparsity"] < 0.9


def test_an_adapter_brings_its_routers(dense: Path, tmp_path: Path, manager: TaskManager) -> None:
    settings = {"expert_size": 5, "partition": "random", "router": "centroid", "budget": "uniform"}
    base = LlamaForCausalLM.from_pretrained(dense)
    get_peft_model(base, PrunePathConfig(task_type="CAUSAL_LM", tau=0.6, **settings)).save_pretrained(tmp_path)
    arguments = {"pretrained": str(dense), "peft": str(tmp_path), "device": "cpu"}
    own = evaluate(PrunePathLM(**arguments), manager)["config"]["prunepath"]
    assert own["tau"] == 0.6
    lower = evaluate(PrunePathLM(tau=0.3, **arguments), manager)["config"]["prunepath"]
    assert 0.1 < own["sparsity"] < lower["sparsity"] < 0.99
    with pytest.raises(UserError, match="sparse already, its experts made: leave out expert_size"):
        PrunePathLM(tau=0.3, expert_size=3, **arguments)


def test_compiled_scores_are_the_same(sparse: Path, manager: TaskManager) -> None:
    """Captured and run as it is: what the other backends do to the graph is tested with them."""
    eager = evaluate(PrunePathLM(pretrained=str(sparse), device="cpu", batch_size=3), manager)
    lm = PrunePathLM(pretrained=str(sparse), device="cpu", batch_size=3, backend="eager")
    compiled = evaluate(lm, manager)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert_same(compiled, eager)
    for key in ("sparsity", "bytes", "tokens", "tau"):
        assert compiled["config"]["prunepath"][key] == pytest.approx(eager["config"]["prunepath"][key], rel=1e-6)
    assert compiled["config"]["prunepath"]["compile_backend"] == "eager"


def test_bytes_are_counted_in_compiled_models(manager: TaskManager) -> None:
    found = {}
    for backend in ("default", "eager"):
        model = sparse_llama()
        set_thresholds(model, inputs=0.3, neurons=0.2)
        lm = PrunePathLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, backend=backend)
        found[backend] = evaluate(lm, manager)["config"]["prunepath"]
    assert found["eager"]["bytes"] == pytest.approx(found["default"]["bytes"], rel=1e-5)
    assert found["eager"]["bytes"] < 1 - found["eager"]["sparsity"], "fewer than active experts alone have"


def test_without_measuring(sparse: Path, manager: TaskManager) -> None:
    lm = PrunePathLM(pretrained=str(sparse), device="cpu", measure=False)
    assert not any(layer.routing_hooks for layer in torch_prunepath.sparse_layers(lm.model).values())
    unmeasured = evaluate(lm, manager)
    assert_same(unmeasured, evaluate(PrunePathLM(pretrained=str(sparse), device="cpu"), manager))
    found = unmeasured["config"]["prunepath"]
    assert (found["sparsity"], found["bytes"], found["tokens"], found["tau"]) == (None, None, None, 0.6)
    assert not any(layer.neuron_recorders for layer in torch_prunepath.sparse_layers(lm.model).values())


# --- which tokens count -----------------------------------------------------------------------------------------------


def sparse_llama() -> Any:
    return torch_prunepath.sparsify(tiny_llama(), tau=0.5, config=SPARSE, progress=False)


def sparse_opt() -> Any:
    """Flattens tokens before its FFN, whose halves are sparse one by one."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=257,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        init_std=0.3,
    )
    return torch_prunepath.sparsify(OPTForCausalLM(config).eval(), tau=0.5, config=SPARSE, progress=False)


@pytest.mark.parametrize("make", [sparse_llama, sparse_opt])
@pytest.mark.parametrize("task", TINY)
def test_padding_does_not_count(make: Any, task: str, manager: TaskManager) -> None:
    """One row at a time there is none: then everything that ran counts."""
    alone = PrunePathLM(pretrained=make(), tokenizer=byte_tokenizer(), max_length=120, batch_size=1)
    with record_sparsity(alone.model) as record:
        evaluate(alone, manager, task)
    batched = PrunePathLM(pretrained=make(), tokenizer=byte_tokenizer(), max_length=120, batch_size=4)
    with record_sparsity(batched.model) as padded:
        evaluate(batched, manager, task)
    mine, his = alone.sparsity_info(), batched.sparsity_info()
    assert mine["tokens"] == record.tokens
    assert mine["sparsity"] == pytest.approx(record.sparsity, rel=1e-9)
    # Left padding moves a row's numbers by a rounding, and its experts with them where tau is that near.
    assert his["tokens"] == pytest.approx(mine["tokens"], abs=0)
    assert his["sparsity"] == pytest.approx(mine["sparsity"], rel=2e-3)
    assert padded.tokens > record.tokens or task == "tiny_text"


def test_looking_for_the_largest_batch_does_not_count(manager: TaskManager) -> None:
    tokens = {}
    for size in (1, "auto"):
        lm = PrunePathLM(pretrained=sparse_llama(), tokenizer=byte_tokenizer(), batch_size=size, max_batch_size=4)
        evaluate(lm, manager, "tiny_choice", "tiny_text")
        tokens[size] = lm.sparsity_info()["tokens"]
    assert tokens["auto"] == tokens[1]


def sparse_t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=257,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        initializer_factor=3.0,
        pad_token_id=0,
        eos_token_id=0,
    )
    return torch_prunepath.sparsify(T5ForConditionalGeneration(config).eval(), tau=0.5, config=SPARSE, progress=False)


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_writing"])
def test_encoder_and_decoder_tokens_count_apart(task: str, manager: TaskManager) -> None:
    alone = PrunePathLM(pretrained=sparse_t5(), tokenizer=byte_tokenizer(), batch_size=1, max_length=128)
    with record_sparsity(alone.model) as record:
        evaluate(alone, manager, task)
    found = alone.sparsity_info()["sparsity_per_layer"]
    assert len(found) == 4
    # What an encoder-decoder writes past a stop sequence lm-eval throws away, but lets it write.
    for name in found if task == "tiny_choice" else [name for name in found if name.startswith("encoder")]:
        assert found[name] == pytest.approx(record.per_layer[name], rel=1e-9), name
    if task == "tiny_choice":  # lm-eval lets an encoder-decoder write more tokens the longer its batch's prompts are
        batched = PrunePathLM(pretrained=sparse_t5(), tokenizer=byte_tokenizer(), batch_size=3, max_length=128)
        evaluate(batched, manager, task)
        assert batched.sparsity_info()["tokens"] == alone.sparsity_info()["tokens"]
        assert batched.sparsity_info()["sparsity_per_layer"] == pytest.approx(found, rel=5e-3)


@pytest.mark.parametrize(
    ("first", "last", "found"), [(1, 9, 1), (4, 9, 4), (9, 9, 9), (12, 9, 9), (1, 0, 0), (1, 1, 1)]
)
def test_first_where(first: int, last: int, found: int) -> None:
    assert first_where(lambda n: n >= first, last) == found


@pytest.mark.parametrize("tau", [1.0, 0.97, 0.5, 1e-3])
@pytest.mark.parametrize("budget", [0.3, 1.0, 2.5])
def test_model_tau_undoes_set_tau(tau: float, budget: float) -> None:
    model = sparse_llama()
    layers = list(torch_prunepath.sparse_layers(model).values())
    layers[0].budget = budget
    set_tau(model, tau)
    assert model_tau(model) == pytest.approx(tau, rel=1e-5)
    if tau < 0.9:
        set_tau(model, [0.8, 0.3])
        assert model_tau(model) is None or budget not in (0.3, 1.0)


# --- what a person can mend -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("dense", {"tau": 0.5, "sparsity": 0.5}, "tau and sparsity are both given"),
        ("dense", {"tau": 1.5}, r"tau=1.5 is outside \(0, 1\]"),
        ("dense", {"tau": "x"}, "tau='x' is no number"),
        ("dense", {"sparsity": 1}, r"sparsity=1.0 is outside \[0, 1\)"),
        ("dense", {"bytes": 0}, r"bytes=0.0 is outside \(0, 1\]"),
        ("dense", {"bytes": "1.5"}, r"bytes=1.5 is outside \(0, 1\]"),
        ("dense", {"bytes": "nan"}, r"bytes=nan is outside \(0, 1\]"),
        ("dense", {"bytes": "x"}, "bytes='x' is no number"),
        ("dense", {"bytes": 0.5, "tau": 0.5}, "tau and bytes are both given, but bytes sets tau and thresholds"),
        ("sparse", {"bytes": 0.5, "sparsity": 0.5}, "sparsity and bytes are both given"),
        ("dense", {}, "the model is dense: give tau=, sparsity= or bytes= to make it sparse, or use --model hf"),
        ("dense", {"tau": 0.5, "partition": "magic"}, "partition='magic' is not known"),
        ("dense", {"tau": 0.5, "backend": "magic"}, "backend='magic' is not known: choose one of default, causal"),
        ("dense", {"tau": 0.5, "calibration_text": "missing"}, "cannot read missing"),
        ("sparse", {"expert_size": 8, "seed": 1}, "sparse already, its experts made: leave out expert_size, seed"),
        ("sparse", {"exclude": "layers.0"}, "sparse already, its experts made: leave out exclude"),
        ("sparse", {"calibration_text": __file__}, "calibration_text is only for sparsity= and bytes="),
    ],
)
def test_refused_before_anything_is_loaded(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, arguments: dict[str, Any], message: str
) -> None:
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(HFLM, "_create_tokenizer", None)
    monkeypatch.setattr(HFLM, "_create_model", None)
    with pytest.raises(UserError, match=message):
        PrunePathLM(pretrained=str(folder), device="cpu", **arguments)


def test_some_networks_are_made_sparse(dense: Path) -> None:
    for choice in ({"exclude": "model.layers.0.*"}, {"include": "layers.1;layers.1.mlp"}, {"include": ["layers.1"]}):
        found = PrunePathLM(pretrained=str(dense), tau=0.5, device="cpu", **choice, **FAST).sparsity_info()
        assert list(found["tau_per_layer"]) == ["model.layers.1.mlp"]
        assert found["skipped"] == [{"name": "model.layers.0.mlp", "reason": "left out as asked"}]
    with pytest.raises(UserError, match=r"exclude='vision' means no FFN of this model: there are model.layers.0.mlp"):
        PrunePathLM(pretrained=str(dense), tau=0.5, device="cpu", exclude="vision;layers.0", **FAST)
    with pytest.raises(UserError, match=f"is a file: name its folder, {dense}"):
        PrunePathLM(pretrained=str(dense / "config.json"), tau=0.5, device="cpu", **FAST)


def test_an_adapter_without_routers_leaves_a_dense_model_dense(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    monkeypatch.setattr(HFLM, "_create_model", None)
    with pytest.raises(UserError, match="the model is dense: give tau="):
        PrunePathLM(pretrained=str(dense), peft=str(tmp_path), device="cpu")


def test_a_model_in_memory_is_refused_alike() -> None:
    with pytest.raises(UserError, match="the model is dense"):
        PrunePathLM(pretrained=tiny_llama(), tokenizer=byte_tokenizer())


def test_lm_eval_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert harness.main() == 2
    assert capsys.readouterr().err == (
        "prunepath-eval: error: lm-eval is not installed: pip install 'torch-prunepath[lm-eval]'\n"
    )
    code = (
        "import sys\nsys.modules['lm_eval'] = None\n"
        "try:\n    import torch_prunepath.integrations.lm_eval\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout == "lm-eval is not installed: pip install 'torch-prunepath[lm-eval]'\n"


# --- being found ------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> registry.Registry:
    """A registry of models of its own."""
    fresh: registry.Registry = registry.Registry("model")
    monkeypatch.setattr(registry, "model_registry", fresh)
    return fresh


def test_this_release_is_told(names: registry.Registry) -> None:
    harness.register()
    harness.register()
    assert registry.get_model("prunepath") is PrunePathLM
    harness.register()


def test_a_release_that_looks_for_entry_points_finds_the_same(names: registry.Registry) -> None:
    (point,) = entry_points(group="lm_eval.models", name="prunepath")
    assert isinstance(point, EntryPoint)
    names.register("prunepath", target=point)
    harness.register()
    assert registry.get_model("prunepath") is PrunePathLM
    harness.register()


def test_importing_the_module_is_enough_and_its_entry_point_may_be_first() -> None:
    code = """
import lm_eval.models
from importlib.metadata import entry_points
from lm_eval.api import registry
{before}
import torch_prunepath.integrations.lm_eval as ours
assert registry.get_model("prunepath") is ours.PrunePathLM
assert registry.get_model("hf").__name__ == "HFLM"
"""
    point = 'registry.model_registry.register("prunepath", target=entry_points(group="lm_eval.models")["prunepath"])'
    for before in ("", point, f'{point}\nregistry.get_model("prunepath")'):
        subprocess.run([sys.executable, "-c", code.format(before=before)], check=True)


def prunepath_eval(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("prunepath-eval")
    command = [str(script), *map(str, arguments)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_command_line(sparse: Path, tasks: Path, tmp_path: Path, manager: TaskManager) -> None:
    shown = prunepath_eval(
        *("--model", "prunepath", "--model_args", f"pretrained={sparse},tau=0.4", "--tasks", ",".join(TINY)),
        *("--include_path", tasks, "--device", "cpu", "--batch_size", 2, "--output_path", tmp_path / "out"),
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    assert all(f"|{task}" in shown.stdout for task in TINY)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    expected = evaluate(PrunePathLM(pretrained=str(sparse), tau=0.4, device="cpu", batch_size=2), manager)
    assert results["config"]["model"] == "prunepath"
    for key in ("tau", "sparsity", "tokens"):
        assert results["config"]["prunepath"][key] == pytest.approx(expected["config"]["prunepath"][key]), key
    assert_same_scores(results, expected)
    share = results["config"]["prunepath"]["sparsity"]
    assert f"{share:.1%} of the FFN neurons were inactive" in shown.stderr


def test_the_command_line_tells_mistakes_in_one_line(dense: Path, tasks: Path, tmp_path: Path) -> None:
    shown = prunepath_eval(
        *("--model", "prunepath", "--model_args", f"pretrained={dense},tau=2", "--tasks", "tiny_text"),
        *("--include_path", tasks, "--device", "cpu"),
        cwd=tmp_path,
    )
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("prunepath-eval: error: tau=2.0 is outside (0, 1]")
