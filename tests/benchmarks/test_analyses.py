"""The analyses: each end to end on a tiny model, restarts, what reconstruction errors mean, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, save_tiny_llama, save_tiny_texts, tiny_llama

from benchmarks.__main__ import main
from benchmarks.analyses import ablations, reconstruction, study
from torch_prunepath import SparsifyConfig, register_routing_hook, set_tau, sparse_layers, sparsify
from torch_prunepath.baselines import lte
from torch_prunepath.console.errors import UserError
from torch_prunepath.layer.router import Router

Runner = Callable[..., tuple[int, str, str]]
SHARES = ("--active", 0.1, 0.25, 0.5, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a sparse one made of it, and texts."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_llama(folder / "tiny")
    save_tiny_texts(folder)
    model = sparsify(tiny_llama(), config=SparsifyConfig(4, "kmeans", "centroid", budget="uniform"), progress=False)
    model.save_pretrained(folder / "sparse")
    byte_tokenizer().save_pretrained(folder / "sparse")
    return folder


@pytest.fixture
def command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run an analysis with these further arguments; exit code, standard output and standard error."""

    def command(name: str, *more: object) -> tuple[int, str, str]:
        given = [name, "run", "--model", place / "tiny", "--text-train", place / "train.txt", "-o", tmp_path / "out"]
        given += ["--text-test", f"test={place / 'test.txt'}", "--context", 32, "--batch-tokens", 128, "--windows", 6]
        given += ["--search-windows", 6, "--calibration-tokens", 512, "--device", "cpu", "--lr", 1e-3, *more]
        capsys.readouterr()
        code = main([str(argument) for argument in given])
        return code, *capsys.readouterr()

    return command


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "runs").iterdir()}


def check_outputs(out: Path, results: dict[str, Any], name: str) -> None:
    """What every analysis leaves behind."""
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG") and (out / "results.md").stat().st_size > 100
    assert results["analysis"] == name and results["failed"] == {}
    assert results["command_line"][0].startswith(f"python -m benchmarks {name} run --model")
    assert f"torch {torch.__version__}" in results["versions"][0] and results["hardware"] and results["commit"]
    assert sorted(results["parts"]) == sorted(path.stem for path in (out / "runs").iterdir())


# --- end to end -----------------------------------------------------------------------------------------------------


def test_reconstruction_of_made_and_loaded_models(command: Runner, place: Path, tmp_path: Path) -> None:
    asked = ("--expert-size", 4, "--seeds", 0, 1, *SHARES, "--checkpoint", f"mine={place / 'sparse'}")
    code, out, err = command("reconstruction", *asked, "--json")
    assert code == 0, err
    results = json.loads(out)
    check_outputs(tmp_path / "out", results, "reconstruction")
    means = {(r["model"], r["by"], r["active"]): r for r in results["rows"] if "layer" not in r}
    names = (*reconstruction.METHODS, "mine")
    assert set(means) == {(m, by, s) for m in names for by in ("router", "oracle") for s in (0.1, 0.25, 0.5, 1.0)}
    for (model, by, share), row in means.items():
        assert row["seeds"] == (1 if model == "mine" else 2)
        assert (row["error"]["mean"] < 1e-6) == (share == 1.0)
        assert row["error"]["least"] <= row["error"]["mean"] <= row["error"]["most"] <= 1.2
        assert row["error"]["mean"] <= means[model, "router", share]["error"]["mean"] + 1e-6, "the oracle is the best"
        layers = [
            r for r in results["rows"] if "layer" in r and (r["model"], r["by"], r["active"]) == (model, by, share)
        ]
        assert len(layers) == 2 and {r["experts"]["mean"] for r in layers} == {max(1, round(16 * share))}
        mean = sum(r["error"]["mean"] for r in layers) / 2
        assert mean == pytest.approx(row["error"]["mean"], abs=1e-6)
    code, out, _ = command("reconstruction", *asked)
    assert code == 0 and "| lte | router |" in out and "as converted" in out


def test_training_changes_what_is_reconstructed(command: Runner, tmp_path: Path) -> None:
    given = ("--expert-size", 4, "--methods", "lte", "moefication-centroid", "--sparsity", 0.5, *SHARES)
    code, _, err = command("reconstruction", *given, "--steps", 8)
    assert code == 0, err
    for path in (tmp_path / "out" / "runs").iterdir():
        run = json.loads(path.read_text())
        assert run["training"]["steps"] == 8 == sum(stage["config"]["steps"] for stage in run["stages"])


@pytest.mark.parametrize("name", ["initialisation", "ablations"])
def test_variants_before_and_after_training(command: Runner, tmp_path: Path, name: str) -> None:
    chosen = {
        "initialisation": ("--expert-size", 4, "--partitions", "contiguous", "kmeans", "--routers", "fitted", "zero"),
        "ablations": ("--set", "expert_size=4", "--variants", "ours", "gate-sigmoid", "rule-below"),
    }[name]
    variants = {
        "initialisation": [f"{p}, {r}" for p in ("contiguous", "kmeans") for r in ("fitted", "zero")],
        "ablations": ["ours", "gate-sigmoid", "rule-below", "mine"],
    }[name]
    more = () if name == "initialisation" else ("--variant", "mine:router_norm=True;entropy=1e-3")
    asked = (*chosen, *more, "--sparsity", 0.3, 0.6, "--seeds", 0, 1, "--steps", 6, "--json")
    code, out, err = command(name, *asked)
    assert code == 0, err
    results = json.loads(out)
    check_outputs(tmp_path / "out", results, name)
    rows = {(r["variant"], r["when"], r["text"], r["asked"]): r for r in results["rows"]}
    times, texts = ("converted", "trained"), ("test", "valid")
    assert set(rows) == {(v, when, t, s) for v in variants for when in times for t in texts for s in (0.3, 0.6)}
    for (variant, when, text, share), row in rows.items():
        assert row["seeds"] == 2 and row["perplexity"]["least"] <= row["perplexity"]["mean"]
        assert row["sparsity"]["mean"] == pytest.approx(share, abs=0.02)
        if when == "converted":
            trained = rows[variant, "trained", text, share]
            assert trained["perplexity"]["mean"] < 0.9 * row["perplexity"]["mean"]
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").iterdir()]
    if name == "ablations":
        (mine,) = [run for run in runs if run["about"]["variant"] == "mine" and run["about"]["seed"] == 0]
        assert mine["stages"][0]["config"]["entropy"] == 1e-3 and mine["about"]["settings"]["router_norm"] is True
        assert [(p["first"], p["last"]) for p in mine["stages"][0]["config"]["phases"]][1] == (0.3, 0.6)
    else:
        made = {json.dumps(run["about"]["settings"], sort_keys=True) for run in runs}
        assert len(made) == 4 and all('"expert_size": 4' in text for text in made)


def test_one_sparsity_is_trained_for_and_held(command: Runner, tmp_path: Path) -> None:
    code, _, err = command("ablations", "--set", "expert_size=4", "--variants", "ours", "--sparsity", 0.5, "--steps", 4)
    assert code == 0, err
    (run,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").iterdir()]
    assert run["about"]["method"] == "held" and run["stages"][0]["config"]["phases"][-1]["last"] == 0.5
    assert {row["when"] for row in run["rows"]} == {"converted", "trained"}


def test_tau_is_swept_over_made_and_loaded_models(command: Runner, place: Path, tmp_path: Path) -> None:
    taus = ("--tau", 0.3, 1, 0.9, 0.6)
    asked = ("--checkpoint", f"mine={place / 'sparse'}", "--methods", "ours", "lte", "--set", "expert_size=4", *taus)
    code, out, err = command("taus", *asked, "--json")
    assert code == 0, err
    results = json.loads(out)
    check_outputs(tmp_path / "out", results, "taus")
    rows = {(r["model"], r["text"], r["asked_tau"]): r for r in results["rows"]}
    expected = {(m, t, tau) for m in ("ours", "lte", "mine") for t in ("test", "valid") for tau in (0.3, 0.6, 0.9, 1.0)}
    assert set(rows) == expected | {("dense", "test", 1.0), ("dense", "valid", 1.0)}
    for model in ("ours", "lte", "mine"):
        shares = [rows[model, "test", tau]["sparsity"]["mean"] for tau in (1.0, 0.9, 0.6, 0.3)]
        assert shares[0] == 0 and shares == sorted(shares) and shares[-1] > 0.2
        same = rows[model, "test", 1.0]["perplexity"]["mean"]
        assert same == pytest.approx(rows["dense", "test", 1.0]["perplexity"]["mean"], rel=1e-4)


def test_what_is_done_is_not_done_again(command: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--set", "expert_size=4", "--tau", 1, 0.5)
    _, first, _ = command("taus", *asked, "--json")
    files = files_of(tmp_path / "out")
    _, again, _ = command("taus", *asked, "--json")
    assert again == first and files_of(tmp_path / "out") == files
    assert main(["taus", "report", str(tmp_path / "out"), "--json"]) == 0
    assert capsys.readouterr().out == first, "the report needs nothing but the folder"
    lost = next(path for path in files if "ours" in path.name)
    before = json.loads(files[lost])
    lost.unlink()
    command("taus", *asked)
    assert json.loads(lost.read_text())["rows"] == before["rows"]
    # Whatever decides the outcome makes it another part.
    for more in (("--seeds", 1), ("--set", "partition=kmeans"), ("--tau", 1, 0.4), ("--windows", 5), ("--steps", 2)):
        known = set(files_of(tmp_path / "out"))
        assert command("taus", *asked, *more)[0] == 0
        assert any("ours" in path.name for path in set(files_of(tmp_path / "out")) - known), more
    with study.Store(tmp_path / "out").claim(lost.stem):
        lost.unlink()
        code, out, err = command("taus", *asked)
    assert code == 0 and "in hand elsewhere" in err and "| ours" not in out and not lost.exists()


def test_a_model_that_diverges_is_noted(command: Runner) -> None:
    given = ("--set", "expert_size=4", "--variants", "ours", "--sparsity", 0.5, "--steps", 5)
    code, out, err = command("ablations", *given, "--variant", "wild:norm_lr=1e30;warmup=0;clip=None")
    assert code == 0, err
    assert "failed: ablations-wild" in out and "| ours |" in out


# --- reconstruction errors --------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_layers_themselves() -> None:
    """Against what the layers answer when a hook activates the k best experts, gates and biases included."""
    model = tiny_llama()
    config = SparsifyConfig(8, "contiguous", "centroid", gate="sigmoid", gate_offset=1.0, budget="uniform")
    sparsify(model, config=config, progress=False)
    window_NC = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    found = reconstruction.reconstruction(model, window_NC, (0.25, 1.0), rows=2)
    inputs: dict[str, torch.Tensor] = {}
    with register_routing_hook(model, lambda routing: inputs.update({routing.name: routing.x_TD})), torch.no_grad():
        model(window_NC)
    for name, layer in sparse_layers(model).items():

        def best(routing: Any) -> torch.Tensor:
            chosen = routing.scores_TE.topk(2, dim=-1).indices
            return torch.zeros_like(routing.mask_TE).scatter(-1, chosen, True)

        with torch.no_grad():
            whole_TD = layer(inputs[name])
            with layer_hook(layer, best):
                part_TD = layer(inputs[name])
        expected = float((whole_TD - part_TD).norm() / whole_TD.norm())
        assert found["router", 0.25][name] == pytest.approx(expected, rel=1e-4)
        assert found["router", 1.0][name] == 0.0


class layer_hook:
    def __init__(self, layer: Any, hook: Any) -> None:
        self.handle = layer.register_routing_hook(hook)

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


def test_experts_that_are_always_active_come_first() -> None:
    model, window_NC = tiny_llama(), torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(0))
    sparsify(model, config=SparsifyConfig(8, budget="uniform", shared_experts=2), calibration=window_NC, progress=False)
    found = reconstruction.reconstruction(model, window_NC, (0.25,), rows=4)
    for layer in sparse_layers(model).values():
        layer.router = Router.of(torch.zeros_like(layer.router.weight), torch.arange(8.0))  # nobody asks for them
    again = reconstruction.reconstruction(model, window_NC, (0.25,), rows=4)
    for name, error in found["router", 0.25].items():
        assert again["router", 0.25][name] == pytest.approx(error, rel=1e-4) and error > 0.01


def test_a_perfect_router_has_the_oracle_s_error() -> None:
    model = tiny_llama()
    sparsify(model, config=SparsifyConfig(8, "contiguous", "zero", budget="uniform"), progress=False)
    for layer in sparse_layers(model).values():
        # One expert alone contributes, and the router says so.
        view = layer.view() if hasattr(layer, "view") else None
        down = layer.down_proj if view is None else view.down
        with torch.no_grad():
            down.weight[:, 8:] = 0.0
        layer.router = Router.of(torch.zeros_like(layer.router.weight), torch.arange(8.0, 0.0, -1.0))
    window_NC = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    found = reconstruction.reconstruction(model, window_NC, (0.125,), rows=2)
    assert all(error == pytest.approx(0.0, abs=1e-6) for layers in found.values() for error in layers.values())


def test_every_expert_is_ranked_whatever_the_model_s_tau() -> None:
    model = tiny_llama()
    lte(model, expert_size=8, progress=False).start_second_stage()
    window_NC = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    once = reconstruction.reconstruction(model, window_NC, (0.5,), rows=2)
    set_tau(model, 0.1)
    assert reconstruction.reconstruction(model, window_NC, (0.5,), rows=1) == {
        key: pytest.approx(layers, rel=1e-5) for key, layers in once.items()
    }


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "remedy"),
    [
        ("reconstruction", ["--active", 0], "outside (0, 1]"),
        ("reconstruction", ["--expert-size", 0], "must be positive"),
        ("reconstruction", ["--checkpoint", "nowhere"], "write --checkpoint NAME=DIR"),
        ("reconstruction", ["--checkpoint", "dense={place}/tiny"], "holds no sparse model"),
        ("reconstruction", ["--methods", "lte", "--steps", 1], "both stages need a step"),
        ("initialisation", ["--steps", -1], "must not be negative"),
        ("initialisation", ["--sparsity", 1], "outside (0, 1)"),
        ("initialisation", ["--set", "magic=1"], "no method has magic"),
        ("ablations", ["--variant", "mine"], "NAME:FIELD=VALUE"),
        ("ablations", ["--variant", "mine:gate_offset=1"], "set gate='sigmoid'"),
        ("ablations", ["--lr", 0], "must be positive"),
        ("taus", ["--tau", 0], "outside (0, 1]"),
        ("taus", ["--methods"], "give --checkpoint NAME=DIR or --methods"),
        ("taus", ["--device", "nowhere"], "this machine has none"),
    ],
)
def test_bad_arguments_are_refused(command: Runner, place: Path, name: str, given: list[Any], remedy: str) -> None:
    code, out, err = command(name, *(str(argument).format(place=place) for argument in given))
    assert (code, out) == (2, "")
    assert remedy in err and err.count("error:") == 1


def test_foreign_folders_and_other_tokens_are_refused(command: Runner, place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, err = command("taus")
    assert code == 2 and "holds something else" in err
    (tmp_path / "out" / "mine.txt").unlink()
    other = tmp_path / "other"
    sparsify(tiny_llama(), config=SparsifyConfig(4, "kmeans", "centroid", budget="uniform"), progress=False)
    model = sparsify(tiny_llama(), config=SparsifyConfig(4, "kmeans", "centroid", budget="uniform"), progress=False)
    model.save_pretrained(other)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    code, _, err = command("taus", "--checkpoint", f"other={other}")
    assert code == 2 and "reads other tokens" in err


def test_variants_are_settings_that_exist() -> None:
    assert ablations.parse("a:gate=sigmoid;gate-offset=8.0") == ("a", {"gate": "sigmoid", "gate_offset": 8.0})
    known = study.METHODS["held"].fields
    assert all(set(settings) <= known for settings in ablations.VARIANTS.values())
    with pytest.raises(UserError):
        ablations.parse("a:gate")
