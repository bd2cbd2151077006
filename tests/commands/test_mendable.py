"""What a person can mend is one line on standard error, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llama import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torch_prunepath import sparse_layers
from torch_prunepath.commands import cli

Run = Callable[..., tuple[int, str, str]]
FAST = ["--partition", "contiguous", "--router", "zero", "--budget", "uniform"]
TRAIN = ["--steps", 4, "--batch", 2, "--context", 32, "--distil", 0, "--expert-size", 8]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; return its exit code, standard output and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "") and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("prunepath: error: ")]
    assert all(part in line for part in parts), line


def nothing_written() -> bool:
    return not list(Path().iterdir())


def commands(model: object, text: object) -> dict[str, list[object]]:
    """Every command that takes a model's folder."""
    return {
        "sparsify": ["sparsify", model, "-o", "out", "--text", text, *FAST],
        "quickstart": ["quickstart", "--model", model, "-o", "out", "--text", text, "--tau", 0.9],
        "train": ["train", model, "-o", "out", "--text", text, *TRAIN],
        "info": ["info", model],
        "bench": ["bench", "ffn", "--geometry", model],
    }


@pytest.mark.parametrize("command", commands("", ""))
def test_a_file_for_a_folder(run: Run, tiny: Path, text: Path, command: str) -> None:
    refused(run(*commands(tiny / "config.json", text)[command]), f"config.json is a file: name its folder, {tiny}")
    assert nothing_written()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"abc")


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))


def words_for_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "x"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


DAMAGES = [truncated, no_pickle, other_sizes, words_for_numbers, no_config, a_list]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model(run: Run, tiny: Path, text: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    damage(folder)
    for command in ("sparsify", "train"):
        refused(run(*commands(folder, text)[command]), f"cannot load the model '{folder}'", "give a folder")
    assert nothing_written()


def test_a_tokenizer_with_more_tokens_than_the_embedding(run: Run, text: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=100, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    for command in ("sparsify", "quickstart", "train"):
        found = run(*commands(tmp_path / "small", text)[command])
        refused(found, "the tokenizer has 257 and the model 100 token ids", "use the tokenizer of this model")
    assert nothing_written()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize(
    "command",
    [
        ["train", "never-loaded", "-o", "out", "--text", "t", "--lr"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--router-lr"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--epochs"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--distil"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--target-sparsity"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--gate-offset"],
        ["sparsify", "never-loaded", "-o", "out", "--tau"],
        ["sparsify", "never-loaded", "-o", "out", "--sparsity"],
        ["sparsify", "never-loaded", "-o", "out", "--bytes"],
        ["sparsify", "never-loaded", "-o", "out", "--shared-experts"],
        ["quickstart", "--tau", "0.9"],
        ["quickstart", "--bytes"],
        ["sweep", "never-loaded", "--tasks", "t", "--bytes"],
        ["sweep", "never-loaded", "--tasks", "t", "--limit"],
        ["bench", "ffn", "--geometry", "smollm2-135m", "--seconds"],
    ],
    ids=lambda command: f"{command[0]}{command[-1]}",
)
def test_numbers_that_are_not_finite(run: Run, command: list[str], value: str) -> None:
    *rest, last = command
    name = last if last.startswith("--") else "--tau"
    given = [*rest, f"{last}={value}"] if last.startswith("--") else [*command, value.lstrip("-")]
    refused(run(*given), name, "is no finite number")
    assert nothing_written()


@pytest.mark.parametrize(
    ("field", "message"),
    [("lr=nan", "lr=nan must be positive"), ("lr=1e400", "lr=inf must be finite"), ("warmup=x", "warmup='x' must be")],
)
def test_fields_that_are_no_numbers(run: Run, text: Path, field: str, message: str) -> None:
    refused(run("train", "never-loaded", "-o", "out", "--text", text, "--steps", 2, "--set", field), message)
    assert nothing_written()


@pytest.mark.parametrize(
    "command",
    [
        ["sparsify", "never-loaded", "-o", "out", "--seed"],
        ["quickstart", "--seed"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--seed"],
        ["train", "never-loaded", "-o", "out", "--text", "t", "--batch"],
        ["bench", "ffn", "--geometry", "smollm2-135m", "--seed"],
        ["sparsify", "never-loaded", "-o", "out", "--expert-size"],
    ],
    ids=lambda command: f"{command[0]}{command[-1]}",
)
def test_whole_numbers_that_are_too_large(run: Run, command: list[str]) -> None:
    refused(run(*command, "9" * 23), f"{command[-1]} {'9' * 23} is out of range")
    assert nothing_written()


# --- an unfinished run ------------------------------------------------------------------------------------------------


def unfinished(run: Run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Leave a run of which two steps are saved, and return the command that goes on with it."""
    command = ["train", tiny, "-o", "k", "--text", text, *TRAIN, "--save-every", 2]

    def fail(*_: object, **__: object) -> None:
        raise ValueError("enough")

    with monkeypatch.context() as patch:
        patch.setattr("torch_prunepath.commands.train.job._Session._measured", measured_once(fail))
        run(*command)
    assert Path("k.training/step-2").is_dir() and not Path("k").exists()
    return [*command, "--resume"]


def measured_once(then: Callable[..., None]) -> Callable[..., list[dict[str, object]]]:
    def measured(self: object, when: str) -> list[dict[str, object]]:
        if when == "after":
            then()
        return [{"name": when, "tau": 1.0}]

    return measured


@pytest.mark.parametrize("file", ["state.pt", "session.json", "model/model.safetensors", "model/config.json"])
def test_a_damaged_unfinished_run(run: Run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    command = unfinished(run, tiny, text, monkeypatch)
    whole = Path("k.training/step-2") / file
    for content in (whole.read_bytes()[:200], b"", None):
        whole.unlink()
        if content is not None:
            whole.write_bytes(content)
        refused(run(*command), "the unfinished run in ", "k.training is damaged", "remove it")
        if content is None:
            return
    assert not Path("k").exists()


def test_what_a_killed_save_left_is_no_unfinished_run(run: Run, tiny: Path, text: Path) -> None:
    Path("out.training/.step-2.abcdefgh.partial").mkdir(parents=True)
    assert run(*commands(tiny, text)["train"])[0] == 0
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_a_disk_that_fills_while_a_state_is_saved(
    run: Run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizers raises Exception itself."""

    def save_pretrained(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_pretrained)
    refused(run("train", tiny, "-o", "k", "--text", text, *TRAIN, "--save-every", 2), "no room on disk for", "step-2")
    assert not Path("k").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of files' sizes")
def test_a_file_that_cannot_grow(tiny: Path, text: Path, tmp_path: Path) -> None:
    script = f"""
import resource, signal, sys
from torch_prunepath.commands import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(cli.main({list(map(str, commands(tiny, text)["sparsify"]))!r}))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "cannot write" in ended.stderr and "--output" in ended.stderr
    assert not (tmp_path / "out").exists()


# --- which FFNs -------------------------------------------------------------------------------------------------------


def test_sparsify_leaves_out_what_it_is_asked_to(run: Run, tiny: Path, text: Path) -> None:
    code, out, _ = run(*commands(tiny, text)["sparsify"], "--exclude", "model.layers.0.*", "--json")
    assert code == 0
    skipped = [{"name": "model.layers.0.mlp", "reason": "left out as asked"}]
    assert json.loads(out)["skipped"] == skipped
    model = AutoModelForCausalLM.from_pretrained("out")
    assert list(sparse_layers(model)) == ["model.layers.1.mlp"]
    code, out, _ = run("info", "out", "--json")
    assert [layer["name"] for layer in json.loads(out)["layers"]] == ["model.layers.1.mlp"]
    refused(run("train", "out", "-o", "again", "--text", text, *TRAIN[:-2], "--include", "layers.0"), "leave --include")


def test_train_and_quickstart_take_a_choice(run: Run, tiny: Path, text: Path) -> None:
    for command in ("train", "quickstart"):
        _, out, _ = run(*commands(tiny, text)[command], "--include", "layers.1", "layers.7*", "--json")
        assert out == ""
        _, out, _ = run(*commands(tiny, text)[command], "--include", "layers.1", "--json")
        assert [entry["name"] for entry in json.loads(out)["skipped"]] == ["model.layers.0.mlp"]
        shutil.rmtree("out")
    code, out, _ = run(*commands(tiny, text)["sparsify"], "--include", "layers.1")
    assert code == 0 and "still dense model.layers.0.mlp (left out as asked)" in out


def test_a_choice_of_nothing(run: Run, tiny: Path, text: Path) -> None:
    for command in ("sparsify", "quickstart", "train"):
        found = run(*commands(tiny, text)[command], "--exclude", "vision_tower")
        refused(found, "exclude='vision_tower' means no FFN of this model: there are model.layers.0.mlp")
    assert not Path("out").exists() and torch.is_grad_enabled()
