"""Results in the repository: ``report`` over what earlier versions recorded gives the pages' numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.harness import METHODS
from benchmarks.harness.store import records_of
from torch_prunepath.console.errors import UserError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def page(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def reported(capsys: pytest.CaptureFixture[str], command: str, name: str, *more: str) -> str:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    capsys.readouterr()
    assert main([command, "report", str(RESULTS / f"{name}.json"), *more]) == 0
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before, "a report on a file writes nothing"
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n ").split(" | ")]


def table_rows(text: str, label: str) -> list[list[str]]:
    """Cells behind the label of every row that begins with it."""
    return [cells(line)[1:] for line in text.splitlines() if line.startswith(f"| {label} |")]


PLAIN = {
    "ours, held": "ours, held: a run for each sparsity",
    "ours, held (shared_experts=10)": "ours, held, 10 shared experts",
    "ours, one checkpoint": "ours, one checkpoint, none of these",
    "ours, one checkpoint (shared_experts=10)": "ours, one checkpoint, 10 shared experts",
    "LTE": "LTE, as published",
    "PrunePath, as released (tau=0.5)": "PrunePath, trained at tau 0.5",
    "D2DMoE, max (first=0.3)": "D2DMoE, max, then trained",
}
"""Labels of the report -> of the page, where each row has the runs of one learning rate and everything in full."""


@pytest.mark.parametrize("label", PLAIN)
def test_perplexities_of_books_are_those_of_the_page(label: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = reported(capsys, "books", "adaptation-h200")
    # The budget of the page, not that of the rows with twice the tokens.
    budget = text.split("## smollm2.gguf, 11,599,872 tokens")[1].split("\n## ")[0]
    books, *_ = budget.split("### wikitext2")
    (found,) = table_rows(books, label)
    said, *_ = table_rows(page("adaptation-h200"), PLAIN[label])
    compared = 0
    for cell in said:
        value = re.match(r"[\d.]+( \[[\d., ]+\])?", cell)
        if value is None:
            continue
        compared += 1
        assert any(close(value.group(), other) for other in found), (label, cell, found)
    assert compared >= 2


def close(said: str, found: str) -> bool:
    """Whether a cell begins with the page's numbers, to the digits that the page has."""
    numbers = [re.findall(r"[\d.]+", text.partition("(")[0].partition(" at ")[0]) for text in (said, found)]
    if len(numbers[0]) != len(numbers[1]):
        return False
    digits = [len(number.partition(".")[2]) for number in numbers[0]]
    return all(
        f"{float(b):.{d}f}" == f"{float(a):.{d}f}" or abs(float(a) - float(b)) <= 10**-d
        for a, b, d in zip(*numbers, digits, strict=True)
    )


def test_the_older_page_of_books(capsys: pytest.CaptureFixture[str]) -> None:
    text = reported(capsys, "books", "adaptation-h100")
    numbers = json.loads(reported(capsys, "books", "adaptation-h100", "--json"))
    said = page("adaptation-h100")
    values = [p["perplexity"] for curves in numbers.values() for by in curves.values() for p in by.get("books", [])]
    assert values and sum(f"{value:.1f}" in said or f"{value:.2f}" in said for value in values) >= 0.8 * len(values)
    assert "| dense, fine-tuned |" in text and "float32" not in text.split("###")[0]


GLUE = {"sst2": 1, "mrpc": 2, "rte": 3, "qnli": 4}


@pytest.mark.parametrize(("label", "method"), [("**80%** ours", "held"), ("static, norm", "static-norm")])
def test_accuracies_of_glue_are_those_of_the_page(
    label: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The page's first table: what is distilled alone, at one learning rate.
    runs = json.loads((RESULTS / "understanding-minilm-h200.json").read_text())["runs"]
    fields = {"distill_logits": 2.0, "task": 0}
    own = [run for run in runs if run["config"]["fields"] == fields and run["config"]["lr"] == 1e-4]
    own = [run for run in own if run["commit"] == "2fd28e6"]
    (tmp_path / "runs.json").write_text(json.dumps({"runs": own}))
    assert main(["glue", "report", str(tmp_path / "runs.json"), "--both-halves", "--json"]) == 0
    rows = {(r["task"], r["method"], r["target"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    line = next(line for line in page("understanding-minilm-h200").splitlines() if line.startswith(f"| {label} |"))
    for task, column in GLUE.items():
        accuracy = rows[task, method, 0.8]["metrics"]["accuracy"]
        mean, half = cells(line)[column].split(" +-")
        assert mean == f"{100 * accuracy['mean']:.1f}", task
        # Rounded twice, from two digits to one.
        assert abs(float(half) - 50 * (accuracy["most"] - accuracy["least"])) <= 0.056, task


def test_scores_of_e2e_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads(reported(capsys, "e2e", "generation-smollm2-135m-h200", "--json"))
    assert {row["method"] for row in results["rows"]} >= {"dense", "held", "ours", "static-norm", "moefication-mlp"}
    said = page("generation-smollm2-135m-h200")
    for row in results["rows"]:
        bleu, rouge = row["metrics"]["bleu"]["mean"], row["metrics"]["rouge_l"]["mean"]
        assert f"{bleu:.1f} / {100 * rouge:.1f}" in said, row


ANALYSES = ("ablations-smollm2-135m-h200", "ablations-smollm2-135m", "initialisation-smollm2-135m-h200")


@pytest.mark.parametrize("name", ANALYSES)
def test_variants_are_those_of_the_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = name.partition("-")[0]
    rows = json.loads(reported(capsys, command, name, "--json"))["rows"]
    said = page(name.removesuffix("-h200") if command == "ablations" else name)
    found = [f"{row['perplexity']['mean']:.1f}" for row in rows if row["text"] != "valid"]
    assert found and all(value in said for value in found)


def test_taus_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    name = "taus-smollm2-135m-h200"
    rows = json.loads(reported(capsys, "taus", name, "--json"))["rows"]
    for row in rows:
        if row["text"] == "books" and row["model"] != "dense":
            start = f"| {row['asked_tau']:g} | {row['sparsity']['mean']:.1%} | {row['perplexity']['mean']:.1f} |"
            assert start in page(name)


@pytest.mark.parametrize("name", ["reconstruction-smollm2-135m", "reconstruction-trained-h200"])
def test_reconstruction_errors_are_those_of_the_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (ours, *_) = (line for line in reported(capsys, "reconstruction", name).splitlines() if "| ours | router |" in line)
    found = set(cells(ours))
    said = [cells(line) for line in page("reconstruction-smollm2-135m").splitlines() if line.startswith("| ours")]
    assert any(set(line[2:]) <= found for line in said), (ours, said)


def test_every_kept_run_has_a_name_of_today() -> None:
    for name in ("adaptation-h200", "adaptation-h100", "understanding-minilm-h200", "generation-smollm2-135m-h200"):
        for record in records_of(RESULTS / f"{name}.json").values():
            assert record["job"]["method"] in METHODS


def test_a_file_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="there is no result in"):
        records_of(tmp_path / "none.json")


def test_a_report_is_on_runs_of_its_own_task(capsys: pytest.CaptureFixture[str]) -> None:
    for command, name in (
        ("books", "generation-smollm2-135m-h200"),
        ("glue", "adaptation-h100"),
        ("e2e", "taus-smollm2-135m-h200"),
    ):
        assert main([command, "report", str(RESULTS / f"{name}.json")]) == 2
        assert "there is no result of" in capsys.readouterr().err
    assert main(["taus", "report", str(RESULTS / "adaptation-h100.json")]) == 2
    assert "holds no results of an analysis" in capsys.readouterr().err


# --- the way to every command -----------------------------------------------------------------------------------------


def test_every_command_is_listed_with_a_line_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = [line.split(maxsplit=1) for line in lines if line.split()[:1] == [name]]
        assert len(line) == 2 and line[1][0].isupper()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "kernels"])
def test_every_command_says_what_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and f"benchmarks {name}" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adaptation"]) == 2
    assert "choose from books, glue" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ("partition", "--geometry", "32x8", "--sizes", 4),
        ("cpu_rows", "--geometry", "smollm2-135m", "--seconds", 0.01, "--gigabytes", 0.01),
    ],
)
def test_timings_as_json(given: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, given), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["rows"] and results["commit"] and results["command"].startswith(f"python -m benchmarks {given[0]}")
