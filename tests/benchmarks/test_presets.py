"""The figures' presets: what they say of themselves and of their cost, and each from one end to the other in small."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main as benchmarks
from benchmarks.harness.store import records_of
from benchmarks.presets.command import parser
from benchmarks.presets.cost import Cost, cost_of, costs_of, sizes_of
from benchmarks.presets.preset import ORIGINS, OURS, Given, Part, Preset, Run
from benchmarks.presets.settings import GPT2_MEDIUM, QWEN2_7B, ROBERTA_LARGE
from benchmarks.presets.stand_in import save_data, save_model, shrunk
from benchmarks.sources import SOURCES, read
from benchmarks.tasks.glue import matthews

FIGURES = ("figure2", "figure3", "figure4", "figure5", "figure7", "figure8", "figure9")
DOCS = Path(__file__).parents[2] / "docs"


def preset(name: str) -> Preset:
    found: Preset = importlib.import_module(f"benchmarks.presets.{name}").PRESET
    return found


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, nothing in the user's cache, and no pip at every call of lm-eval."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


# --- from one end to the other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "figure4")) for name in FIGURES]
)
def test_a_stand_in_runs_from_one_end_to_the_other(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [name, "--stand-in", "-o", str(tmp_path), "--device", "cpu", "--commit", "test"]
    assert benchmarks(asked) == 0
    text = capsys.readouterr().out
    small = shrunk(preset(name))
    places = sorted(path for path in tmp_path.iterdir() if path.name not in ("model", "data"))
    assert len(places) == len(small.parts), "a folder of results for each part"
    for place in places:
        assert list(place.glob("*.png")) and list(place.glob("*.md")) and list(place.glob("*.json"))
    records = [record for place in places for record in records_of(place).values()]
    assert all(record["failed"] is None and record["rows"] and record["commit"] == "test" for record in records)
    planned = [run for part in small.parts for run in part.runs()]
    dense = name == "figure8"  # it measures the model that it starts from as well
    assert len(records) == len(planned) + dense, "what --dry-run lists is what is run"
    for part in small.parts:
        assert all(source in text for source in part.sources)

    if name in ("figure3", "figure8"):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/runs/*.json")}
        assert benchmarks([*asked, "--json"]) == 0, "the same command goes on where it was stopped"
        assert json.loads(capsys.readouterr().out)["figure"] == name
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/runs/*.json")}


def test_own_files_take_the_place_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = shrunk(preset("figure3"))
    model, data = save_model(small, tmp_path / "m"), save_data(small, tmp_path / "d")
    asked = ["figure3", "--stand-in", "--model", str(model), "--data", str(data), "-o", str(tmp_path / "out")]
    (data / "cola_dev.jsonl.gz").unlink()
    assert benchmarks([*asked, "--device", "cpu"]) == 2
    assert "there is no cola_dev.jsonl.gz" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/runs/*")), "nothing is trained before all data are there"


def test_without_network_and_model_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **how: Any) -> str:
        raise OSError(f"cannot reach {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert benchmarks(["figure3", "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "FacebookAI/roberta-large cannot be had from the hub" in said and "--model" in said


def test_a_figure_needs_a_place_for_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks(["figure3"]) == 2
    assert "name it with -o, or give --dry-run" in capsys.readouterr().err


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_a_dry_run_lists_every_run_and_its_sums(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks([name, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == len(found["each"]) > 0
    for what in ("flops", "trained_tokens", "read_tokens", "hours"):
        assert found[what] == pytest.approx(sum(row[what] for row in found["each"])) and found[what] > 0
    assert found["hours"] == pytest.approx(found["flops"] / found["tflops"] / 3.6e15)
    assert benchmarks([name, "--dry-run", "--tflops", "400"]) == 0
    text = capsys.readouterr().out
    assert f"{found['runs']} runs" in text and "sustains 400 TFLOP/s" in text
    assert sum(line.startswith(preset(name).parts[0].kind) for line in text.splitlines()) >= 1


def test_sizes_are_the_published_ones() -> None:
    assert round(sizes_of(ROBERTA_LARGE).parameters / 1e6) == 355
    assert round(sizes_of(GPT2_MEDIUM).parameters / 1e6) == 355
    assert round(sizes_of(QWEN2_7B).parameters / 1e9, 2) == 7.62
    for model in (ROBERTA_LARGE, GPT2_MEDIUM, QWEN2_7B):
        sizes = sizes_of(model)
        assert 0 < sizes.multiplied < sizes.parameters
    tied = GPT2_MEDIUM.sizes
    positions = tied["n_positions"] * tied["n_embd"]
    sizes = sizes_of(GPT2_MEDIUM)
    assert sizes.parameters - sizes.multiplied == positions, "its table is the output layer as well"


def test_operations_count_passes_and_tokens() -> None:
    part = Part("glue", ("rte",), {"held": {}, "prunepath": {}}, (0.5, 0.8), dense_lr=(1e-4,), epochs=2.0, batch=32)
    sizes = sizes_of(ROBERTA_LARGE)

    def cost(run: Run, model: Any = ROBERTA_LARGE) -> Cost:
        return cost_of(part, run, model, sizes)

    held = Run("rte", "held", (0.5,), 1e-4, 0)
    steps = 2 * -(-2490 // 32)
    assert cost(held).steps == steps and cost(held).trained == steps * 32 * SOURCES["rte"].tokens
    assert cost(held).read == 277 * SOURCES["rte"].tokens
    assert cost(held).flops == sizes.multiplied * (6 * cost(held).trained + 2 * cost(held).read)
    taught = cost(Run("rte", "held", (0.5,), 1e-4, 0, teacher=True))
    assert taught.flops - cost(held).flops == 2 * sizes.multiplied * taught.trained
    again = cost(held, QWEN2_7B)  # with gradient checkpointing
    assert again.flops - cost(held).flops == 2 * sizes.multiplied * again.trained
    assert cost(Run("rte", "prunepath", (0.5, 0.8), 1e-4, 0)).read == 2 * cost(held).read


def test_jobs_are_those_of_the_methods() -> None:
    methods: dict[str, dict[str, Any]] = {"dense-longer": {}, "prunepath": {}, "held": {"distill_logits": 1.0}}
    part = Part("glue", ("rte", "mrpc"), methods, (0.8, 0.5), (1e-4, 5e-5), (1e-4,), (0, 1), epochs=1.0)
    runs = part.runs()
    assert len(runs) == 2 * 2 * (1 + 2 * (1 + 1 + 2))
    assert {run.sparsity for run in runs if run.method == "prunepath"} == {(0.5, 0.8)}
    assert {run.sparsity for run in runs if run.method == "held"} == {(0.5,), (0.8,)}
    assert {run.method for run in runs if run.teacher} == {"held"}


def test_options_change_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks(["figure4", "--dry-run", "--json", "--seeds", "3", "4", "--steps", "7", "--batch", "8"]) == 0
    rows = json.loads(capsys.readouterr().out)["each"]
    assert {row["seed"] for row in rows} == {3, 4} and {row["steps"] for row in rows} == {7}
    assert {row["trained_tokens"] for row in rows if row["task"] == "wikitext103"} == {7 * 8 * 512}
    assert benchmarks(["figure4", "--dry-run", "--tflops", "0"]) == 2
    assert "--tflops 0.0 must be positive" in capsys.readouterr().err


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_every_figure_is_a_command_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(FIGURES) <= set(COMMANDS)
    assert benchmarks([]) == 0
    listed = capsys.readouterr().out
    assert all(f"Figure {name.removeprefix('figure')}:" in listed for name in FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_every_setting_says_where_it_comes_from(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks([name, "--settings"]) == 0
    text = capsys.readouterr().out
    given = preset(name).given
    assert all(each.value in text for each in given)
    assert all(each.note for each in given if each.origin == OURS and each.name in ("tasks", "model and text"))
    assert benchmarks([name, "--settings", "--json"]) == 0
    assert {row["origin"] for row in json.loads(capsys.readouterr().out)} <= set(ORIGINS)


def test_the_page_says_what_each_figure_costs() -> None:
    page = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    for name in FIGURES:
        costs = [cost for _, cost in costs_of(preset(name))]
        flops, hours = sum(cost.flops for cost in costs), sum(cost.hours(180.0) for cost in costs)
        assert f"| [{name}](#{name.replace('figure', 'figure-')}) | {len(costs):,} | " in page
        assert f" | {flops:.1e} | {hours:,.0f} |" in page, f"{name}: {flops:.1e} | {hours:,.0f}"


def test_the_page_s_commands_are_taken() -> None:
    page = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    found = re.findall(r"^\$ python -m benchmarks (figure\d) (.*)$", page, re.MULTILINE)
    assert {name for name, _ in found} == set(FIGURES)
    for name, options in found:
        parser(preset(name)).parse_args(options.split())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "speech"}, "kind='speech' is unknown"),
        ({"sources": ("imdb",)}, "'imdb' is no data set"),
        ({"sources": ()}, "reads one data set, not 0"),
        ({"methods": {"magic": {}}}, "'magic' is no method"),
        ({"epochs": None}, "give either epochs= or steps="),
        ({"dense_lr": ()}, "give dense_lr="),
    ],
)
def test_a_part_that_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"kind": "glue", "sources": ("rte",), "methods": {}, "sparsity": (0.5,)}
    with pytest.raises(ValueError, match=words):
        Part(**{**right, "dense_lr": (1e-4,), "epochs": 1.0, **fields})
    with pytest.raises(ValueError, match="origin='hearsay' is unknown"):
        Given("lr", "1e-4", "hearsay")


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["figure3", "figure4", "figure5"])
def test_stand_ins_have_the_architecture_and_the_fields(name: str, tmp_path: Path) -> None:
    small = shrunk(preset(name))
    folder = save_model(small, tmp_path / "model")
    made = getattr(transformers, small.model.architecture).from_pretrained(folder)
    assert sum(parameter.numel() for parameter in made.parameters()) < 200_000
    data = save_data(small, tmp_path / "data")
    for part in small.parts:
        for source in part.sources:
            for split in part.splits:
                assert read(SOURCES[source], split, data)


def test_matthews_correlation() -> None:
    assert matthews([1, 0, 1, 0], [1, 0, 1, 0]) == 1.0 and matthews([0, 1], [1, 0]) == -1.0
    assert matthews([1, 1, 1], [1, 0, 1]) == 0.0
    assert matthews([1, 1, 0, 0, 1], [1, 0, 0, 1, 1]) == pytest.approx(1 / 6)
