"""What the benchmarks share: files written whole, one process a run, settings on the command line, reports' parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.options import changes, check_positive
from benchmarks.common.report import markdown, origin, origins, spread_of, write
from benchmarks.common.store import Cache, Store, digest, replacing
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
        store.all()
    store.write("b", {"x": 1})
    store.write("a", {"x": None})
    assert store.has("a") and not store.has("c") and store.read("c") is None
    assert store.all() == {"a": {"x": None}, "b": {"x": 1}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write("c", {"x": float("nan")})
    assert not store.has("c")
    (tmp_path / "runs" / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json cannot be read .* remove it"):
        store.all()


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
    Store(tmp_path).write("a", {})
    Store(tmp_path).check_free()


def test_a_cache_makes_each_thing_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        return {"x_N": torch.arange(3)}

    cache = Cache(tmp_path)
    first, kept = cache.get("thing", ["key", 1], make)
    again, kept_again = cache.get("thing", ["key", 1], make)
    assert (kept, kept_again, len(made)) == (False, True, 1)
    assert torch.equal(first["x_N"], again["x_N"])
    cache.get("thing", ["key", 2], make)
    assert len(made) == 2
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"half")
    with pytest.raises(UserError, match="remove it, and run again"):
        cache.get("thing", ["key", 1], make)


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
