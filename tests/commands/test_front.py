"""Every command lets the model read what its tokenizer puts in front of a text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_llama
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from torch_prunepath import sparsity
from torch_prunepath.commands import cli
from torch_prunepath.integrations.lm_eval import PrunePathLM
from torch_prunepath.sparsity import SparsityRecord

FRONT = 7
"""Id of the token in front; the text below has none of it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model whose tokenizer puts a token in front, and a text."""
    tokenizer = byte_tokenizer()
    template = TemplateProcessing(single=["<front>", "$A"], special_tokens=[("<front>", FRONT)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    lines = "".join(f"Line {i} of a text about {i * i % 97}.\n\n" for i in range(300))
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The token ids of every forward pass over more than one token of a row."""
    seen: list[torch.Tensor] = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def watched(self: Any, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        assert input_ids is not None
        if input_ids.shape[1] > 1:
            seen.append(input_ids.detach().clone())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return seen


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def assert_in_front(read: list[torch.Tensor]) -> None:
    assert len(read) >= 3
    for ids in read:
        assert (ids[:, 0] == FRONT).all() and not (ids[:, 1:] == FRONT).any()
        assert not torch.isin(ids[:, 1:4], torch.tensor(byte_tokenizer()("\ufeff")["input_ids"])).all(1).any()


@pytest.mark.parametrize("goal", [("--tau", 0.8), ("--sparsity", 0.3), ("--bytes", 0.6)])
def test_sparsify(
    folder: Path, read: list[torch.Tensor], goal: tuple[str, float], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    records: list[SparsityRecord] = []
    made = SparsityRecord.__init__

    def noted(self: SparsityRecord) -> None:
        made(self)
        records.append(self)

    monkeypatch.setattr(sparsity.SparsityRecord, "__init__", noted)
    model, text = folder / "model", folder / "text"
    found = run(capsys, "sparsify", model, "--text", text, *goal, "--expert-size", 8, "-o", folder / "out")
    assert_in_front(read)
    windows, context = divmod(found["text"]["held_out_tokens"], found["text"]["context"])
    assert context == 0
    assert records[-1].tokens == windows * (found["text"]["context"] - 1), "the token in front does not count"


@pytest.mark.parametrize("points", [(), ("--bytes", 0.8, 0.6)])
def test_quickstart(
    folder: Path, read: list[torch.Tensor], points: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "quickstart", "--model", folder / "model", "--text", folder / "text", *points, "-o", folder / "out")
    assert_in_front(read)


@pytest.mark.parametrize("measured", [True, False])
def test_train(folder: Path, read: list[torch.Tensor], measured: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options: list[object] = ["--steps", 3, "--batch", 4, "--context", 32, "--expert-size", 4]
    options += ["--eval-text", folder / "text"] if measured else []
    target = ["--target-sparsity", 0.3, "-o", folder / "out"]
    run(capsys, "train", folder / "model", "--text", folder / "text", *target, *options)
    assert_in_front(read)


@pytest.mark.parametrize("goal", [{"sparsity": 0.3}, {"bytes": 0.6}])
def test_lm_eval(folder: Path, read: list[torch.Tensor], goal: dict[str, float]) -> None:
    settings = {"expert_size": 8, "calibration_text": str(folder / "text"), "device": "cpu"}
    PrunePathLM(pretrained=str(folder / "model"), **goal, **settings)
    assert_in_front(read)


def test_bench(folder: Path, read: list[torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "bench", "ffn", "--geometry", folder / "model", "--batch", 1, "--sparsity", 0.5, "-o", folder / "out")
    assert_in_front(read)


@pytest.mark.parametrize("command", ["sparsify", "quickstart", "train"])
def test_a_tokenizer_of_another_model(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(100)
    model.save_pretrained(folder / "model")
    arguments: dict[str, list[object]] = {
        "sparsify": ["sparsify", folder / "model", "--tau", 0.8],
        "quickstart": ["quickstart", "--model", folder / "model"],
        "train": ["train", folder / "model", "--target-sparsity", 0.3, "--steps", 2],
    }
    asked = [*arguments[command], "--text", folder / "text", "-o", folder / "out"]
    assert cli.main([str(argument) for argument in asked]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunepath: error")]
    assert "the text holds the token id 221, but the tokenizer has 257 and the model 100 token ids" in line
    assert not (folder / "out").exists()
