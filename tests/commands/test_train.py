"""``prunepath train``: what it writes, that it resumes to the same result, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from torch_prunepath import sparse_layers, sparsify
from torch_prunepath.commands import cli
from torch_prunepath.commands.train import job
from torch_prunepath.commands.train.unfinished import Kept
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder
from torch_prunepath.train import TrainConfig, recipes

Run = Callable[..., tuple[int, str, str]]
FAST = ["--steps", 12, "--batch", 4, "--context", 32, "--lr", "3e-3", "--router-lr", "1e-2", "--distil", 0]
FAST += ["--expert-size", 4]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; return its exit code, standard output and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["train", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "") and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("prunepath: error: ")]
    assert all(part in line for part in parts), line
    assert not Path("out").exists()


def same_results(whole: str, again: str) -> None:
    """Of an uninterrupted run in ``whole`` and one that went on in ``out``: what they printed and wrote."""
    one, two = json.loads(whole), json.loads(again)
    assert one["rows"] == two["rows"] and one["last"] == two["last"]
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in ("whole", "out"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    histories = [json.loads(Path(folder, "training.json").read_text())["history"] for folder in ("whole", "out")]
    assert histories[0] == histories[1]


def card_of(folder: Path) -> dict[str, Any]:
    """The rows of the model card's tables: the first cell -> the second, or a list of the others."""
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first: others[0] if len(others) == 1 else others for first, *others in cells}


def test_a_dense_model_becomes_a_better_sparse_one(run: Run, tiny: Path, text: Path) -> None:
    flags = ["--eval-text", text, "--target-sparsity", 0.6, *FAST, "--steps", 40, "--json"]
    code, out, err = run(tiny, "--text", text, "-o", "out", *flags)
    assert code == 0 and out.count("\n") == 1
    results = json.loads(out)
    names = ["dense", "before, tau 1", "before, 60% asked", "after, tau 1", "after, 60% asked"]
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == names
    assert rows["before, tau 1"]["perplexity"] == pytest.approx(rows["dense"]["perplexity"], rel=1e-4)
    assert rows[names[4]]["perplexity"] < 0.5 * rows[names[2]]["perplexity"]
    assert rows[names[4]]["sparsity"] == pytest.approx(0.6, abs=0.05) and rows[names[3]]["sparsity"] == 0
    assert results["experts"]["expert_size"] == 4
    assert all(word in err for word in ("training: 100%", "loss=", "sparsity=", "tau="))
    written = json.loads(Path("out/training.json").read_text())
    history = written.pop("history")
    assert written == results
    assert [record["step"] for record in history] == list(range(40)) and history[-1] == results["last"]
    assert results["versions"]["torch"] == torch.__version__ and results["command_line"].startswith("prunepath train")
    assert TrainConfig.from_dict(results["config"]).phases == recipes.ours(40).phases
    model = AutoModelForCausalLM.from_pretrained("out")
    assert [float(layer.tau) for layer in sparse_layers(model).values()] != [1.0, 1.0]
    card = card_of(Path("out"))
    assert card["inactive FFN neurons"] == f"{rows[names[4]]['sparsity']:.1%}" and card["recipe"] == "ours, 40 steps"
    assert all(card[f"perplexity, {name}"] == f"{row['perplexity']:.2f}" for name, row in rows.items())
    assert [float(card[f"`{name}`"][2]) for name in sparse_layers(model)] == pytest.approx(
        [float(layer.tau) for layer in sparse_layers(model).values()], rel=1e-5
    )
    shares = [float(card[f"`{name}`"][3].rstrip("%")) / 100 for name in sparse_layers(model)]
    assert sum(shares) / 2 == pytest.approx(rows[names[4]]["sparsity"], abs=2e-3)
    ids = torch.tensor(byte_tokenizer()(text.read_text())["input_ids"][: 32 * 64]).view(-1, 32)
    assert job.perplexity(model.eval(), ids) == pytest.approx(rows[names[4]]["perplexity"], rel=0.1)
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_for_people_and_without_a_text_to_measure_on(run: Run, tiny: Path, text: Path) -> None:
    code, out, _ = run(tiny, "--text", text, "-o", "out", *FAST)
    assert code == 0
    assert "perplexity" not in out and "12 steps on cpu" in out and "checkpoint  out" in out
    card = card_of(Path("out"))
    assert float(card["inactive FFN neurons"].rstrip("%")) == pytest.approx(70, abs=1), "of the text trained on"
    assert not [name for name in card if "perplexity" in name]


def test_ours_learns_from_the_dense_model_unless_asked_not_to(run: Run, tiny: Path, text: Path) -> None:
    rest = ["--text", text, "--steps", 2, "--batch", 2, "--context", 32]
    code, out, _ = run(tiny, *rest, "-o", "first", "--expert-size", 4, "--shared-experts", 0.1)
    assert code == 0 and f"distilled from {tiny} (weight 1)" in out
    results = json.loads(Path("first/training.json").read_text())
    assert results["config"]["distill_logits"] == 1.0 and results["teacher"] == str(tiny)
    layers = sparse_layers(AutoModelForCausalLM.from_pretrained("first")).values()
    assert all(layer.experts.shared == round(0.1 * layer.num_experts) > 0 for layer in layers)
    for number, (start, flags, weight) in enumerate(
        [
            (tiny, ["--expert-size", 4, "--distil", 0], 0.0),
            (tiny, ["--expert-size", 4, "--distil", 0.5, "--recipe", "held"], 0.5),
            (tiny, ["--expert-size", 4, "--routers-only"], 0.0),
            (tiny, ["--expert-size", 4, "--recipe", "paper"], 0.0),
            ("first", [], 0.0),
            ("first", ["--teacher", tiny], 1.0),
        ]
    ):
        code, out, _ = run(start, *rest, "-o", f"out{number}", *flags, "--json")
        assert code == 0
        results = json.loads(out)
        assert results["config"]["distill_logits"] == weight
        assert results["teacher"] == (str(tiny) if weight else None)
    refused(run(tiny, *rest, "-o", "out", "--teacher", tiny, "--distil", 0), "--teacher is only for --distil")
    refused(run(tiny, *rest, "-o", "out", "--set", "distill_logits=2"), "give --distil WEIGHT in place of --set")


def test_compiled_blocks_train_the_same(run: Run, tiny: Path, text: Path) -> None:
    flags = [tiny, "--text", text, *FAST, "--json", "-o"]
    eager, compiled = (
        json.loads(run(*flags, out, *how)[1]) for out, how in (("a", []), ("b", ["--compile", "aot_eager"]))
    )
    assert compiled["last"] == pytest.approx(eager["last"], rel=1e-3)
    refused(run(*flags, "out", "--compile", "--checkpointing"), "--compile and --checkpointing exclude each other")


def test_a_sparse_model_goes_on(run: Run, tiny: Path, text: Path) -> None:
    assert run(tiny, "--text", text, "-o", "first", *FAST)[0] == 0
    flags = [*FAST[:-2], "--recipe", "held", "--target-sparsity", 0.5, "--routers-only", "--json"]
    code, out, _ = run("first", "--text", text, "-o", "out", *flags)
    assert code == 0
    results = json.loads(out)
    assert results["config"]["train"] == "routers" and results["config"]["phases"][-1]["last"] == 0.5
    assert results["experts"]["expert_size"] == 4
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("first", "out"))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {k for k in before if ".router." in k}


def test_the_paper_recipe_has_its_experts_and_stages(run: Run, tiny: Path, text: Path) -> None:
    flags = ["--recipe", "paper", "--batch", 16, "--context", 32, "--set", "tau=0.5", "--distil", 0.5, "--json"]
    # Two experts a layer: less than half can be inactive.
    flags += ["--target-sparsity", 0.2, "--partition", "contiguous"]
    code, out, _ = run(tiny, "--text", text, "-o", "out", *flags)
    assert code == 0
    results = json.loads(out)
    expected = {**vars(recipes.EXPERTS["paper"]), "partition": "contiguous"}
    assert results["experts"] == expected and expected["gate"] == "sigmoid"
    passes = -(-results["data"]["tokens"] // (16 * 32))
    assert results["steps"] == 2 * passes
    assert (results["config"]["entropy"], results["config"]["distill_logits"]) == (3e-4, 0.5)
    assert results["last"]["tau"] == 0.5


def test_a_checkpoint_of_a_baseline_is_refused(run: Run, tiny: Path, text: Path) -> None:
    """Checkpoints held LTE's rule once."""
    sparsify(tiny_llama(), progress=False).save_pretrained("baseline")
    byte_tokenizer().save_pretrained("baseline")
    config = json.loads(Path("baseline/config.json").read_text())
    config["quantization_config"]["shared"]["selection"] = "threshold"
    Path("baseline/config.json").write_text(json.dumps(config))
    refused(run("baseline", "--text", text, "-o", "out", *FAST[:-2]), "by 'threshold', the rule of a baseline")
    # As an unfinished run of LTE left it, which this command once trained.
    Path("out.training/step-3").mkdir(parents=True)
    shutil.move("baseline", "out.training/step-3/model")
    refused(run(tiny, "--text", text, "-o", "out", *FAST, "--resume"), "the rule of a baseline")


def test_an_unfinished_run_of_an_earlier_version_can_be_resumed(tmp_path: Path) -> None:
    kept = Kept(data="x", dtype="float32", distil=0.0, rows=[], history=[])
    (tmp_path / "session.json").write_text(json.dumps({**dataclasses.asdict(kept), "stage": 0}))
    assert Kept.of(tmp_path) == kept


def test_tokens_epochs_and_fields_reach_the_run(run: Run, tiny: Path, text: Path) -> None:
    flags = ["--batch", 4, "--accumulation", 2, "--context", 32, "--expert-size", 4, "--seed", 3, "--bf16", "--json"]
    fields = ["--set", "high=0.8", "--set", "log=True", "--set", "temperature=2", "--checkpointing"]
    code, out, _ = run(tiny, "--text", text, "-o", "a", *flags, *fields, "--tokens", 1024)
    assert code == 0
    config = json.loads(out)["config"]
    assert (config["steps"], config["accumulation"], config["seed"], config["autocast"]) == (4, 2, 3, True)
    drawn = config["phases"][1]
    assert (config["temperature"], drawn["kind"], drawn["last"]) == (2, "random-log", 0.8)
    code, out, _ = run(tiny, "--text", text, "-o", "b", *flags, "--epochs", 0.5)
    windows = json.loads(out)["data"]["tokens"] // 32
    assert json.loads(out)["steps"] == pytest.approx(0.5 * windows / 8, abs=1)


def test_weights_keep_the_dtype_of_the_model(run: Run, text: Path, tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    assert run(tmp_path / "half", "--text", text, "-o", "out", *FAST)[0] == 0
    kinds = {value.dtype for key, value in load_file("out/model.safetensors").items() if "permutation" not in key}
    assert kinds == {torch.bfloat16}


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "distil"),
    [(KeyboardInterrupt, ["--distil"]), (MemoryError, ["--recipe", "ours"])],
    ids=["interrupted", "failed"],
)
def test_an_unfinished_run_goes_on_to_the_same_result(
    run: Run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], distil: list[str]
) -> None:
    flags = ["--text", text, "--eval-text", text, *FAST, *distil, "--save-every", 3, "--json"]
    _, whole, _ = run(tiny, "-o", "whole", *flags)
    real = job.train

    def stopping(*args: Any, callback: Any, **kwargs: Any) -> Any:
        def note(state: Any, record: Any) -> None:
            callback(state, record)
            if state.step == 8:
                raise stop

        return real(*args, callback=note, **kwargs)

    monkeypatch.setattr(job, "train", stopping)
    if stop is KeyboardInterrupt:
        code, _, err = run(tiny, "-o", "out", *flags)
        assert code == 130 and "go on with --resume" in err
    else:
        with pytest.raises(stop):
            run(tiny, "-o", "out", *flags)
    monkeypatch.undo()
    monkeypatch.chdir(text.parent / "cwd")
    assert [path.name for path in Path("out.training").iterdir()] == ["step-6"]
    refused(run(tiny, "-o", "out", *flags), "holds an unfinished run", "--resume")
    refused(run(tiny, "-o", "out", *flags, "--resume", "--seed", 5), "other data")
    refused(run(tiny, "-o", "out", *flags, "--resume", "--bf16"), "belongs to another run, with autocast=False")
    code, again, _ = run(tiny, "-o", "out", *flags, "--resume")
    assert code == 0
    same_results(whole, again)
    assert sorted(path.name for path in Path().iterdir()) == ["out", "whole"]


# --- data sets --------------------------------------------------------------------------------------------------------


def test_a_data_set_is_read(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"story": line} for line in text.read_text().split("\n\n") if line]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    code, out, _ = run(tiny, "--dataset", folder, "--text-column", "story", "-o", "out", *FAST, "--json")
    assert code == 0
    found = json.loads(out)["data"]
    assert found["name"] == f"{folder} train" and found["tokens"] > 0.95 * len(text.read_text()) - 32
    result = run(tiny, "--dataset", folder, "-o", "other", *FAST)
    refused_as(result, "has no column 'text'", "--text-column from story")


def refused_as(result: tuple[int, str, str], *parts: str) -> None:
    assert result[0] == 2 and all(part in result[2].splitlines()[-1] for part in parts), result[2]


def test_a_data_set_that_cannot_be_had(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        run(tiny, "--dataset", "no/such-data", "-o", "out"), "cannot load the data set 'no/such-data train'", "--text"
    )


def test_without_the_package_datasets(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run(tiny, "--dataset", "any", "-o", "out"), "pip install 'torch-prunepath[train]'")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "magic"], "choose one of paper, "),
        (["--recipe", "lte"], "--recipe 'lte' is not known"),
        (["--target-sparsity", "1"], "--target-sparsity 1.0 is outside [0, 1)"),
        (["--steps", "0"], "--steps 0 must be positive"),
        (["--batch", "-1"], "--batch -1 must be positive"),
        (["--context", "1"], "give at least 2"),
        (["--lr", "-1"], "lr=-1.0 must be positive"),
        (["--set", "magic=1"], "--set magic is no field"),
        (["--set", "entropy"], "write --set entropy=VALUE"),
        (["--set", "distill_logits=1"], "give --distil"),
        (["--expert-size", "0"], "expert_size=0 must be at least 1"),
        (["--recipe", "paper", "--teacher", "m"], "--teacher is only for --distil"),
        (["--device", "tpu"], "--device tpu: this machine has none"),
        (["--eval-text", "missing"], "cannot read missing"),
        (["--resume"], "there is no unfinished run"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    run: Run, text: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_model", None)
    refused(run("never-loaded", "--text", text, "-o", "out", *flags), message)
    assert list(Path().iterdir()) == []


def test_a_missing_text_and_a_taken_output(run: Run, tiny: Path, text: Path) -> None:
    refused(run(tiny, "--text", "missing", "-o", "out"), "cannot read missing")
    Path("taken").mkdir()
    Path("taken/file").touch()
    refused(run(tiny, "--text", text, "-o", "taken", *FAST), "taken exists", "--output")
    (text.parent / "short").write_text("short")
    refused(run(tiny, "--text", text.parent / "short", "-o", "out", *FAST), "too short")


def test_what_does_not_fit_the_model(run: Run, tiny: Path, text: Path) -> None:
    sparsify(tiny_llama(), progress=False).save_pretrained("sparse")
    byte_tokenizer().save_pretrained("sparse")
    refused(run("sparse", "--text", text, "-o", "out", *FAST), "is sparse already: leave --expert-size out")
    rest = ["--text", text, "-o", "out", *FAST[:-2]]
    refused(run("sparse", *rest, "--distil"), "name the dense model with --teacher")
    refused(run(tiny, *rest, "--target-sparsity", 0.99), "sparsity 0.99 is out of reach")
    refused(run(tiny, *rest, "--routers-only", "--set", "contribution_fit=0"), "nothing trains the routers")
    refused(run(tiny, *rest, "--lr", "1e30", "--set", "warmup=0", "--set", "clip=None"), "lower the learning rates")


@pytest.mark.slow
def test_smollm2_gets_better(run: Run, tmp_path: Path) -> None:
    """A real model, a few steps: it follows the text it is trained on at the sparsity that is asked."""
    file = cache_folder() / Path(SMOLLM2.member).name
    if not file.is_file():
        pytest.skip("SmolLM2-135M is not in the cache: prunepath quickstart downloads it")
    from pydoc_data.topics import topics

    (tmp_path / "text").write_text("\n\n".join(text for _, text in sorted(topics.items()))[:8_000])
    flags = ["--target-sparsity", 0.5, "--steps", 8, "--batch", 2, "--context", 64, "--lr", "1e-4", "--json"]
    flags += [
        "--partition",
        "contiguous",
        "--budget",
        "uniform",
        "--calibration-tokens",
        1024,
        "--recipe",
        "held",
        "--eval-text",
        tmp_path / "text",
        "--set",
        "warmup=0",
    ]
    code, out, _ = run(file, "--text", tmp_path / "text", "-o", "out", *flags)
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows["after, 50% asked"]["perplexity"] < 0.9 * rows["before, 50% asked"]["perplexity"]
    assert rows["after, 50% asked"]["sparsity"] == pytest.approx(0.5, abs=0.05)


def test_the_command_line_imports_neither_datasets_nor_the_trainer() -> None:
    code = (
        "import sys; from torch_prunepath.commands import cli; cli._parser()\n"
        "assert not {'datasets', 'transformers.trainer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
