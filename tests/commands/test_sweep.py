from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api import registry
from lm_eval.tasks import TaskManager
from lm_eval_tasks import TINY, isolate, write_tiny_tasks
from tiny_llama import byte_tokenizer, save_tiny_llama, tiny_llama

import torch_prunepath
from torch_prunepath import SparsifyConfig
from torch_prunepath.commands import cli
from torch_prunepath.commands.points import Point
from torch_prunepath.commands.sweep import run as work
from torch_prunepath.commands.sweep.options import SweepOptions
from torch_prunepath.commands.sweep.scores import headline, scores_of
from torch_prunepath.evaluation import lm_eval as harness
from torch_prunepath.evaluation.make_sparse import reach_bytes

FAST = ["--expert-size", 4, "--partition", "random", "--router", "centroid", "--budget", "uniform"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("datasets"))
        # lm-eval's thousands of own tasks take seconds to read, each time.
        patch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    config = SparsifyConfig(expert_size=5, partition="random", router="centroid", budget="uniform")
    torch_prunepath.sparsify(tiny_llama(), tau=0.6, config=config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sweep(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in an empty folder; return its exit code, standard output and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def sweep(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["sweep", "--include-path", str(tasks), "--device", "cpu", *map(str, arguments)])
        return code, *capsys.readouterr()

    return sweep


def test_a_dense_model_over_taus(sweep: Any, dense: Path) -> None:
    flags = ["--tasks", *TINY, "--tau", 0.5, 1, 0.8, "--batch-size", 4, *FAST]
    code, out, _ = sweep(dense, *flags, "--json", "-o", "out")
    assert code == 0
    results = json.loads(out)
    reference, same, more, most = results["rows"]
    assert [row["name"] for row in results["rows"]] == ["dense", "tau 1", "tau 0.8", "tau 0.5"]
    assert [row["tau"] for row in results["rows"]] == [1.0, 1.0, 0.8, 0.5]
    assert 0.0 == reference["sparsity"] == same["sparsity"] < more["sparsity"] < most["sparsity"] < 1
    assert results["headlines"] == {
        "tiny_choice": "acc_norm",
        "tiny_text": "bits_per_byte",
        "tiny_writing": "exact_match",
    }
    for task in TINY:
        for metric, score in reference["scores"][task].items():
            assert same["scores"][task][metric]["value"] == pytest.approx(score["value"], rel=1e-5)
    text = [row["scores"]["tiny_text"]["bits_per_byte"]["value"] for row in results["rows"]]
    assert text[3] != pytest.approx(text[0], rel=1e-3)
    assert reference["scores"]["tiny_text"]["bits_per_byte"]["higher_is_better"] is False
    assert reference["scores"]["tiny_choice"]["acc"]["stderr"] > 0
    assert same["tokens"] > 0
    assert results["config"]["expert_size"] == 4
    assert results["text"]["calibration_tokens"] > 0
    assert results["versions"]["lm-eval"]
    assert json.loads(Path("out/results.json").read_text()) == results
    assert Path(results["plot"]).read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_over_sparsities(sweep: Any, sparse: Path) -> None:
    flags = ["--tasks", "tiny_choice,tiny_text", "--sparsity", 0.5, 0, 0.3, "--limit", 4]
    code, out, _ = sweep(sparse, *flags, "--json")
    assert code == 0
    results = json.loads(out)
    assert [row["name"] for row in results["rows"]] == ["tau 1", "sparsity 0.3", "sparsity 0.5"]
    full, less, more = results["rows"]
    assert (full["tau"], full["sparsity"]) == (1.0, 0.0)
    assert less["sparsity"] == pytest.approx(0.3, abs=0.1)
    assert more["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert 1 > less["tau"] > more["tau"]
    assert results["config"]["expert_size"] == 5
    assert (results["plot"], results["output"]) == (None, None)
    assert list(Path().iterdir()) == []


def test_over_bytes(sweep: Any, dense: Path, sparse: Path) -> None:
    flags = ["--tasks", "tiny_choice", "--limit", 4, "--bytes", 0.5, 1, 0.7, "--json", "-o", "out"]
    for model, settings in ((dense, ["--expert-size", 8]), (sparse, [])):
        code, out, _ = sweep(model, *flags, *settings)
        assert code == 0
        rows = json.loads(out)["rows"]
        names = ["dense", "bytes 1", "bytes 0.7", "bytes 0.5"] if settings else ["bytes 1", "bytes 0.7", "bytes 0.5"]
        assert [row["name"] for row in rows] == names
        full, less, least = rows[-3:]
        assert [row["target_bytes"] for row in rows[-3:]] == [1.0, 0.7, 0.5]
        assert (full["tau"], full["sparsity"], less["tau"]) == (1.0, 0.0, None)
        assert 1 < full["bytes"] < 1.2
        assert less["bytes"] == pytest.approx(0.7, abs=0.1) and least["bytes"] == pytest.approx(0.5, abs=0.1)
        assert Path("out/sweep.png").is_file()
    code, out, _ = sweep(sparse, "--tasks", "tiny_choice", "--limit", 4, "--bytes", 0.5)
    assert code == 0
    assert [line.split()[:4] for line in out.splitlines() if "read" in line or "by layer" in line] == [
        ["tau", "sparsity", "bytes", "read"], ["bytes", "0.5", "by", "layer"],
    ]  # fmt: skip


def test_a_sweep_measures_its_path_once(sweep: Any, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def noted(model: Any, share: float, *data: Any) -> float:
        measured.append(share)
        return reach_bytes(model, share, *data)

    monkeypatch.setattr(work, "reach_bytes", noted)
    code, *_ = sweep(dense, "--tasks", "tiny_text", "--limit", 2, "--bytes", 0.8, 0.7, 0.6, "--expert-size", 8)
    assert (code, measured) == (0, [0.8])


def test_limit_and_examples_reach_lm_eval(sweep: Any, sparse: Path) -> None:
    tokens = {}
    for flags in ((), ("--limit", 4), ("--limit", 0.5), ("--limit", 4, "--num-fewshot", 2)):
        _, out, _ = sweep(sparse, "--tasks", "tiny_choice", "--tau", 1, "--json", *flags)
        (row,) = json.loads(out)["rows"]
        tokens[flags] = row["tokens"]
    assert tokens["--limit", 4] == tokens["--limit", 0.5] < tokens[()]
    assert tokens["--limit", 4, "--num-fewshot", 2] > tokens["--limit", 4]


def test_for_people(sweep: Any, dense: Path) -> None:
    code, out, err = sweep(dense, "--tasks", "tiny_text", "--tau", 0.5, "--dtype", "bfloat16", *FAST, "-o", "out")
    assert code == 0
    lines = out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split() == ["tau", "sparsity", "tiny_text", "bits_per_byte"]]
    assert [line.split()[:2] for line in lines[head + 1 : head + 3]] == [["dense", "1"], ["tau", "0.5"]]
    assert "bfloat16" in lines[0]
    assert "dense: evaluating" in err
    assert [line.split(":")[0] for line in err.splitlines() if "bits_per_byte" in line] == ["dense", "tau 0.5"]
    code, _, _ = sweep(dense, "--tasks", "tiny_text", "--tau", 0.9, *FAST, "-o", "out")  # its own output is replaced
    assert code == 0
    assert json.loads(Path("out/results.json").read_text())["rows"][1]["tau"] == 0.9


def test_without_matplotlib(sweep: Any, sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = sweep(sparse, "--tasks", "tiny_text", "--tau", 0.5, "-o", "out")
    assert code == 0
    assert "no matplotlib" in out
    assert [line for line in err.splitlines() if "pip install matplotlib" in line]
    assert json.loads(Path("out/results.json").read_text())["plot"] is None


# --- what a person can mend -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tau", 1.5], "tau=1.5 is outside (0, 1]"),
        (["--sparsity", 0.5, 1], "sparsity=1.0 is outside [0, 1)"),
        (["--bytes", 0.5, 0], "bytes=0.0 is outside (0, 1]"),
        (["--bytes", 1.5], "bytes=1.5 is outside (0, 1]"),
        (["--partition", "magic"], "partition='magic' is not known"),
        (["--limit", 0], "limit=0 leaves no document"),
        (["--text", "missing"], "cannot read missing"),
        (["--tasks", "tiny_txet"], "lm-eval knows no task 'tiny_txet'"),
        (["--include-path", "missing"], "--include-path missing is no folder"),
    ],
)
def test_refused_before_the_model_is_loaded(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, flags: list[Any], message: str
) -> None:
    monkeypatch.setattr(work, "load_model", None)
    code, out, err = sweep("never-loaded", "--tasks", "tiny_text", *flags)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("prunepath: error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-size", 3, "--seed", 1], "is sparse already: leave out --expert-size, --seed"),
        (["--device", "nowhere"], "cannot move the model to nowhere"),
        (["--sparsity", 0.95], "sparsity 0.95 is out of reach"),
        (["--bytes", 0.01], "0.01 of the bytes is out of reach"),
    ],
)
def test_refused_after_loading(sweep: Any, sparse: Path, flags: list[Any], message: str) -> None:
    code, out, err = sweep(sparse, "--tasks", "tiny_text", "-o", "out", *flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert list(Path().iterdir()) == []


def test_tau_and_sparsity_exclude_each_other(sweep: Any, sparse: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep(sparse, "--tasks", "tiny_text", "--tau", 0.5, "--sparsity", 0.5)
    assert caught.value.code == 2
    with pytest.raises(ValueError, match="give one list"):
        SweepOptions(model="m", tasks=["t"], taus=[0.5], sparsities=[0.5])
    with pytest.raises(ValueError, match="tau and bytes are both given: give one list"):
        SweepOptions(model="m", tasks=["t"], taus=[0.5], shares=[0.5])


def test_lm_eval_is_not_installed(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object | None:
        return None if name == "lm_eval" else object()

    monkeypatch.setattr(harness.importlib.util, "find_spec", find_spec)
    code, _, err = sweep("never-loaded", "--tasks", "tiny_text")
    assert code == 2
    assert err.splitlines()[-1].endswith("lm-eval is not installed: pip install 'torch-prunepath[lm-eval]'")
    assert "hf" in registry.model_registry


# --- points and scores ------------------------------------------------------------------------------------------------


def test_points_come_from_dense_to_sparse_once_each() -> None:
    asked = functools.partial(SweepOptions, model="m", tasks=["t"])
    assert asked(taus=[0.5, 1, 0.5]).points == [Point(tau=1.0), Point(tau=0.5)]
    assert asked(sparsities=[0.5, 0, 0.5]).points == [Point(sparsity=0.0), Point(sparsity=0.5)]
    assert asked(shares=[0.5, 1, 0.5]).points == [Point(bytes=1.0), Point(bytes=0.5)]
    assert [point.dense for point in asked().points] == [False] * 5
    assert Point(bytes=1.0).dense and not Point(bytes=0.5).dense


RESULTS = {
    "results": {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 10},
        "b": {"exact_match,strict": 1, "exact_match_stderr,strict": "N/A", "exact_match,flexible": float("nan")},
        "tag": {"alias": "tag", " ": " "},
    },
    "groups": {"g": {"acc,none": 0.25, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.0}},
    "higher_is_better": {"a": {"acc": True}},
}


def test_scores_are_the_finite_numbers() -> None:
    found = scores_of(RESULTS)
    assert found["a"] == {"acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": True}}
    assert found["b"] == {"exact_match,strict": {"value": 1.0, "stderr": None, "higher_is_better": None}}
    assert found["g"]["acc_norm"] == {"value": 0.75, "stderr": 0.0, "higher_is_better": None}
    assert set(found) == {"a", "b", "g"}


def test_the_most_telling_metric_of_what_was_asked() -> None:
    found = scores_of(RESULTS)
    assert headline(found, ["g", "a"]) == {"g": "acc_norm", "a": "acc"}
    assert headline(found, ["tag"]) == {"a": "acc", "b": "exact_match,strict", "g": "acc_norm"}
