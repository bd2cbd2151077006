"""The harness: files written whole, one process a run, kept models, settings on the command line, reports' parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

from benchmarks.harness.jobs import check_positive
from benchmarks.harness.kept import describe, load_tensors, restore, save_tensors
from benchmarks.harness.options import changes
from benchmarks.harness.report import markdown, origin, origins, spread_of, write
from benchmarks.harness.store import FORMAT, Cache, Store, digest, records_of, replacing
from torch_prunepath import SparsifyConfig, set_tau, sparse_layers, sparsify
from torch_prunepath.baselines import d2dmoe, lte, moefication
from torch_prunepath.console.errors import UserError


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a.json"
    with replacing(path) as part:
        part.write_text("whole")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "whole"
    assert list((tmp_path / "runs").iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write"), replacing(path / "below"):
        pass


def test_runs_are_kept_by_name_and_damage_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="there is no result in"):
        records_of(tmp_path)
    store.write("b", {"x": 1})
    store.write("a", {"x": None})
    assert store.has("a") and not store.has("c") and store.read("c") is None
    assert records_of(tmp_path) == {"a": {"x": None}, "b": {"x": 1}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write("c", {"x": float("nan")})
    assert not store.has("c")
    (tmp_path / "runs" / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json cannot be read .* remove it"):
        records_of(tmp_path)


def test_one_process_has_a_run_in_hand(tmp_path: Path) -> None:
    with Store(tmp_path).claim("a") as mine, Store(tmp_path).claim("a") as again, Store(tmp_path).claim("b") as other:
        assert (mine, again, other) == (True, False, True)
    with Store(tmp_path).claim("a") as mine:
        assert mine


def test_results_do_not_go_among_other_files(tmp_path: Path) -> None:
    Store(tmp_path / "new").check_free()
    Store(tmp_path).check_free()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        Store(tmp_path).check_free()
    Store(tmp_path).write("a", {"format": FORMAT})
    Store(tmp_path).check_free()


def test_runs_of_other_versions_are_read_but_get_no_new_ones_beside_them(tmp_path: Path) -> None:
    store, about = Store(tmp_path), {"task": "rte", "seed": 0, "lr": 1e-4, "steps": 5, "data": "d", "weights": "w"}
    for name, method in (("a", "ours"), ("b", "ours-one"), ("c", "static")):
        config = {**about, "method": method, "targets": [0.8], "fields": {"score": "rms"} if name == "c" else {}}
        store.write(name, {"config": config, "points": [{"target": 0.8, "tau": 0.5}]})
    found = records_of(tmp_path)
    assert [record["job"]["method"] for record in found.values()] == ["held", "ours", "static-rms"]
    assert all(record["job"]["settings"] == {} for record in found.values())
    assert found["a"]["rows"] == [{"asked": 0.8, "tau": 0.5}] and found["a"]["failed"] is None
    with pytest.raises(UserError, match=r"holds runs of another version .* another folder"):
        store.check_free()


def test_a_cache_makes_each_thing_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        same_N = torch.arange(3)
        return {"x_N": same_N, "again_N": same_N, "ids_N": torch.tensor([1, 65535], dtype=torch.int32)}, {"said": [1]}

    cache = Cache(tmp_path)
    first, said, kept = cache.tensors("thing", ["key", 1], make)
    again, said_again, kept_again = cache.tensors("thing", ["key", 1], make)
    assert (kept, kept_again, len(made)) == (False, True, 1) and said == said_again == {"said": [1]}
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    cache.tensors("thing", ["key", 2], make)
    assert len(made) == 2
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"half")
    with pytest.raises(UserError, match="remove it, and run again"):
        cache.tensors("thing", ["key", 1], make)


def test_a_folder_is_made_once_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).place("model", 1, fail)
    place = Cache(tmp_path).place("model", 1, Path.mkdir)
    assert place.is_dir() and Cache(tmp_path).place("model", 1, fail) == place


def test_nothing_is_kept_as_a_pickle() -> None:
    for path in (Path(__file__).parents[2] / "benchmarks").rglob("*.py"):
        assert not re.search(r"torch\.(load|save)\(|pickle\.", path.read_text(encoding="utf-8")), path


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "sparsified": lambda model: sparsify(model, tau=0.8, calibration=WINDOW_NC, config=EXPERTS, progress=False),
    "norm": lambda model: sparsify(
        model,
        tau=0.7,
        config=SparsifyConfig(7, "kmeans", "centroid", budget="uniform", router_norm=True),
        progress=False,
    ),
    "gate": lambda model: sparsify(
        model,
        tau=0.7,
        config=SparsifyConfig(8, "kmeans", "centroid", gate="sigmoid", gate_offset=2.0, budget="uniform"),
    ),
    "mlp": lambda model: moefication(model, WINDOW_NC, expert_size=8, tau=0.5, epochs=1, progress=False),
    "centroid": lambda model: moefication(model, router="centroid", expert_size=8, tau=0.5, progress=False),
    "lte": lambda model: lte(model, expert_size=8, progress=False),
    "d2dmoe": lambda model: d2dmoe(model, WINDOW_NC, expert_size=8, tau=0.6, epochs=1, progress=False),
}
WINDOW_NC = torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(0))
EXPERTS = SparsifyConfig(4, shared_experts=1)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_converted_model_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    CONVERSIONS[kind](model)
    save_tensors(tmp_path / "kept", model.state_dict(), describe(model))
    again = tiny_llama(seed=1)
    restore(again, *load_tensors(tmp_path / "kept"))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(again).values(), strict=True):
        assert (layer.experts, layer.budget, layer.selection) == (other.experts, other.budget, other.selection)
        assert type(layer.router) is type(other.router) and torch.equal(layer.tau, other.tau)
    with torch.no_grad():
        assert torch.equal(model(WINDOW_NC).logits, again(WINDOW_NC).logits)
    set_tau(model, 0.3)
    set_tau(again, 0.3)
    with torch.no_grad():
        assert torch.equal(model(WINDOW_NC).logits, again(WINDOW_NC).logits)


def test_digests_depend_on_values_alone() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    # Names of runs that are kept begin with it: it must not change.
    assert digest({"a": 1}, 8) == "f9d86028"


KNOWN = {"ours": {"lr", "expert_size"}, "static-norm": {"lr", "score"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"ours": {}, "static-norm": {}}),
        (["lr=1e-3"], {"ours": {"lr": 1e-3}, "static-norm": {"lr": 1e-3}}),
        (["expert-size=4", "ours:lr=None"], {"ours": {"expert_size": 4, "lr": None}, "static-norm": {}}),
        (
            ["static-norm.score=n", "lr=1", "ours.lr=2"],
            {"ours": {"lr": 2}, "static-norm": {"score": "n", "lr": 1}},
        ),
        (["lr=[1, 'a.b:c']"], {"ours": {"lr": [1, "a.b:c"]}, "static-norm": {"lr": [1, "a.b:c"]}}),
    ],
)
def test_settings_go_to_the_methods_that_have_them(given: list[str], expected: dict[str, Any]) -> None:
    assert changes(given, KNOWN) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lr", "says no value"),
        ("dense:lr=1", "'dense' is not among --methods ours static-norm"),
        ("size=1", "no method has size: choose from expert_size, lr, score"),
        ("ours:score=norm", "no method has score: choose from expert_size, lr"),
    ],
)
def test_settings_that_nobody_has_are_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        changes([given], KNOWN)


def test_numbers_must_be_positive() -> None:
    check_positive({"steps": 1, "seconds": None})
    with pytest.raises(UserError, match="--batch-tokens 0 must be positive"):
        check_positive({"batch_tokens": 0})


def test_reports_say_where_numbers_come_from(tmp_path: Path) -> None:
    run = origin("python bench.py", "abc", ["pytest", "no_such_package"])
    assert run["versions"]["pytest"] == pytest.__version__ and "no_such_package" not in run["versions"]
    assert (run["command_line"], run["commit"]) == ("python bench.py", "abc")
    found = origins([run, run, {**run, "commit": None}])
    assert found["commit"] == ["None", "abc"] and len(found["hardware"]) == 1
    assert f"torch {torch.__version__}" in found["versions"][0]
    assert vars(spread_of([3.0, 1.0, 2.0])) == {"mean": 2.0, "least": 1.0, "most": 3.0}
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    assert write(tmp_path, "text", {"x": 1}) == '{\n "x": 1\n}'
    assert (tmp_path / "report.md").read_text() == "text\n"
