"""Saving and loading: bit-exact with the package, dense without it, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import torch_prunepath
from torch_prunepath import SparsifyConfig, densify, load, set_tau, sparse_layers, sparsify
from torch_prunepath.checkpoint import read_info
from torch_prunepath.config import FFNSpec
from torch_prunepath.layer import ExpertsSpec
from torch_prunepath.layer.manifest import LayerManifest, Manifest
from torch_prunepath.layer.saving import describe

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")

SAVED = [name for name, make in ARCHITECTURES.items() if hasattr(make()[0], "save_pretrained")]

FORMAT_1 = """
{"quant_method": "prunepath", "format_version": 1, "layers": [{"ffn": {"name": "model.layers.0.mlp", "up":
"up_proj", "down": "down_proj", "activation": "silu", "hidden_size": 32, "ffn_size": 37, "split": false, "gate":
"gate_proj", "fused": null, "hidden_dropout": null, "output_dropout": null}, "experts": {"expert_size": 8, "rule":
"reach", "gate": "one", "gate_offset": 0.0, "shared": 0}, "tau": 0.25, "budget": 1.0, "router_bias": false,
"router_norm": false, "selection": null}, {"ffn": {"name": "model.layers.1.mlp", "up": "up_proj", "down":
"down_proj", "activation": "silu", "hidden_size": 32, "ffn_size": 37, "split": false, "gate": "gate_proj", "fused":
null, "hidden_dropout": null, "output_dropout": null}, "experts": {"expert_size": 8, "rule": "reach", "gate": "one",
"gate_offset": 0.0, "shared": 0}, "tau": 0.5, "budget": 1.0, "router_bias": false, "router_norm": false,
"selection": null}], "config": {"expert_size": 8, "partition": "random", "router": "centroid", "router_norm": false,
"shared_experts": 0, "rule": "reach", "gate": "one", "gate_offset": 0.0, "budget": "uniform", "calibration_tokens":
16384, "seed": 0}}
"""
"""What format 1 wrote for the llama of these tests: random experts of 8, centroid routers, one tau for each layer."""


def first_output(model, inputs):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A fitted sparse llama with a tau of its own per layer, and where it is saved."""
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model, tau=0.6, config=SparsifyConfig(expert_size=8), calibration=inputs, progress=False)
    taus = [0.3 + 0.2 * i for i in range(len(sparse_layers(model)))]
    set_tau(model, taus)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return model, inputs, directory


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def edit_config(directory: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = directory / "config.json"
    data = json.loads(path.read_text())
    change(data["quantization_config"])
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES[name]()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    if (
        dtype != model.dtype
    ):  # as users get there: to() would also round position tables, which loading keeps in float32
        model.save_pretrained(tmp_path / "dense")
        model = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
    sparsify(model, tau=0.6, config=CONFIG, progress=False)
    expected = first_output(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(first_output(again, inputs), expected)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
        assert value.stride() == after[key].stride(), f"{key}: laid out as before"
    assert [(m.tau, m.ffn) for m in sparse_layers(again).values()] == [
        (m.tau, m.ffn) for m in sparse_layers(model).values()
    ]
    again.save_pretrained(tmp_path / "again")
    assert read_info(tmp_path / "again") == read_info(tmp_path)
    dense, _ = ARCHITECTURES[name]()
    for key, value in densify(again).state_dict().items():
        assert torch.equal(value, dense.to(dtype).state_dict()[key]), "densify works after loading, too"


def test_load_keeps_per_layer_tau_and_budgets(saved) -> None:  # type: ignore[no-untyped-def]
    model, inputs, directory = saved
    again = load(directory)
    assert torch.equal(first_output(again, inputs), first_output(model, inputs))
    for mine, theirs in zip(sparse_layers(model).values(), sparse_layers(again).values(), strict=True):
        assert torch.equal(mine.tau, theirs.tau) and mine.budget == theirs.budget
    assert load(directory, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_headless_and_headed_classes_load_each_others_checkpoints(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, inputs, directory = saved
    bare = AutoModel.from_pretrained(directory)
    assert torch.equal(first_output(bare, inputs), first_output(model.model, inputs))
    bare.save_pretrained(tmp_path)
    headed = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(first_output(headed.model, inputs), first_output(model.model, inputs))


def test_sharded_checkpoint(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, inputs, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(first_output(load(tmp_path), inputs), first_output(model, inputs))


def test_loaded_model_trains_and_is_no_quantised_model(saved) -> None:  # type: ignore[no-untyped-def]
    _, inputs, directory = saved
    model = load(directory)
    assert getattr(model, "hf_quantizer", None) is None and not getattr(model, "is_quantized", False)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_without_the_package_it_is_the_dense_model(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, inputs, directory = saved
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}).eval()
assert "torch_prunepath" not in sys.modules
with torch.no_grad():
    torch.save(model(**torch.load({str(tmp_path / "inputs.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    dense, _ = ARCHITECTURES["llama"]()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), first_output(dense, inputs), rtol=1e-5, atol=1e-5)


def test_info(saved) -> None:  # type: ignore[no-untyped-def]
    model, _, directory = saved
    info = read_info(directory)
    json.dumps(info)
    assert [layer["name"] for layer in info["layers"]] == list(sparse_layers(model))
    first, layer = info["layers"][0], next(iter(sparse_layers(model).values()))
    assert first["experts"] == layer.num_experts and first["tau"] == float(layer.tau)
    assert info["config"]["expert_size"] == 8


def test_densified_model_saves_as_dense(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, _ = ARCHITECTURES["llama"]()
    densify(sparsify(model, config=CONFIG, progress=False)).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no sparse model"):
        load(tmp_path)


def test_newer_format_is_refused(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = copied(saved[2], tmp_path)
    edit_config(directory, lambda manifest: manifest.update(format_version=99))
    for call in (load, AutoModelForCausalLM.from_pretrained, read_info):
        with pytest.raises(ValueError, match=r"format 99.*upgrade torch_prunepath"):
            call(directory)


def test_format_1_is_still_read(tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES["llama"]()
    config = SparsifyConfig(expert_size=8, partition="random", router="centroid", budget="uniform")
    set_tau(sparsify(model, config=config, progress=False), [0.25, 0.5])
    model.save_pretrained(tmp_path)
    old = json.loads(FORMAT_1)
    edit_config(tmp_path, lambda manifest: (manifest.clear(), manifest.update(old)))
    loaded = load(tmp_path)
    assert [float(layer.tau) for layer in sparse_layers(loaded).values()] == [0.25, 0.5]
    assert torch.equal(first_output(loaded, inputs), first_output(model, inputs))
    assert Manifest.from_dict(old) == describe(model) == describe(loaded)
    assert read_info(tmp_path)["format_version"] == 1, "what the file has, not what it would be written as"


def test_what_layers_share_is_written_once(saved) -> None:  # type: ignore[no-untyped-def]
    written = json.loads((saved[2] / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 2
    assert written["shared"]["ffn"]["activation"] == "silu" and written["shared"]["experts"]["expert_size"] == 8
    for number, layer in enumerate(written["layers"]):
        assert layer.pop("ffn") == {"name": f"model.layers.{number}.mlp"}
        assert layer.keys() == {"tau", "budget"}


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("differ", [(), ("budget",), ("ffn_size", "gate"), ("shared", "router_bias")], ids=str)
def test_any_manifest_survives_the_round_trip(layers: int, differ: tuple[str, ...]) -> None:
    """Also where layers differ in what they usually share."""

    def layer(i: int) -> LayerManifest:
        odd = {name: i % 2 == 1 for name in differ}
        gate = None if odd.get("gate") else "gate"
        ffn = FFNSpec(f"layers.{i}", "up", "down", "silu", 8, 64 if odd.get("ffn_size") else 32, gate=gate)
        experts = ExpertsSpec(8, shared=int(odd.get("shared", False)))
        return LayerManifest(ffn, experts, 0.5, 1.0 + odd.get("budget", False), odd.get("router_bias", False))

    manifest = Manifest(tuple(map(layer, range(layers))), SparsifyConfig())
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.pop("layers"),
        lambda m: m.pop("shared"),
        lambda m: m.update(shared=3),
        lambda m: m.pop("format_version"),
        lambda m: m["layers"][0].pop("ffn"),
        lambda m: m["layers"][0].update(tau=7),
        lambda m: m["layers"][0].update(surprise=1),
        lambda m: m["layers"][0]["ffn"].update(activation="sine"),
    ],
    ids=["layers", "shared", "no-dict", "version", "ffn", "tau", "unknown-key", "activation"],
)
def test_damaged_manifest_is_refused(saved, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    directory = copied(saved[2], tmp_path)
    edit_config(directory, damage)
    for call in (load, AutoModelForCausalLM.from_pretrained, read_info):
        with pytest.raises(ValueError, match="damaged prunepath manifest"):
            call(directory)


@pytest.mark.parametrize("place", ["shared", "layer"])
def test_the_rule_of_a_baseline_is_refused(saved, place: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Checkpoints held LTE's once."""
    directory = copied(saved[2], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    manifest = config["quantization_config"]
    (manifest["shared"] if place == "shared" else manifest["layers"][1])["selection"] = "threshold"
    (directory / "config.json").write_text(json.dumps(config))
    for call in (load, read_info, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"^this checkpoint selects experts by 'threshold'"):
            call(directory)


@pytest.mark.parametrize("key", ["router.weight", "router.bias", "permutation"])
@pytest.mark.parametrize("call", [load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
def test_missing_tensor_is_refused(saved, tmp_path: Path, key: str, call) -> None:  # type: ignore[no-untyped-def]
    directory = copied(saved[2], tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.{key}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.{key} is missing"):
        call(directory)


def test_damaged_permutation_is_refused(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = copied(saved[2], tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.permutation"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="permutation is not a permutation of its neurons"):
        load(directory)


def test_manifest_of_another_model_is_refused(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = copied(saved[2], tmp_path)
    edit_config(directory, lambda m: m["layers"][0]["ffn"].update(name="model.layers.77.mlp"))
    with pytest.raises(ValueError, match="has none: load it with the class"):
        load(directory)
    edit_config(directory, lambda m: m["layers"][0]["ffn"].update(name="model.layers.0.mlp", ffn_size=40))
    with pytest.raises(ValueError, match="do not belong together"):
        load(directory)


def test_missing_and_corrupt_files_are_refused(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
    directory = copied(saved[2], tmp_path)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for call in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="save or download the model again"):
            call(directory)
    file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load(directory)


def test_unknown_architecture_is_refused(saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = copied(saved[2], tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match=r"which transformers .* does not have"):
        torch_prunepath.load(directory)
