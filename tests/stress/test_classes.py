"""A sample of transformers' classes, another one every day, and always those whose families are tested."""

from __future__ import annotations

import datetime
import os
import random
import time

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, ViTConfig, ViTModel

from tests.stress.classes import Result, check, check_apart, entries, main, read, table
from tests.stress.shrink import LAYERS, VOCABULARY, build, configs, requests

DAY = os.environ.get("PRUNEPATH_STRESS_DAY", datetime.date.today().isoformat())
"""The day whose sample is tested; PRUNEPATH_STRESS_DAY=2026-11-28 tests that day's again."""
SAMPLE = 12
FAMILIES = ("LlamaModel", "GPT2Model", "OPTModel", "BertModel", "T5Model", "ViTModel", "WhisperModel")
CODES = (
    "DiaForConditionalGeneration",
    "DiaModel",
    "MusicgenForConditionalGeneration",
    "MusicgenMelodyForConditionalGeneration",
    "MusicgenMelodyModel",
)
"""Classes whose decoders take several codes for each token."""
KNOWN: dict[str, str] = {}
"""Classes that are known to be wrong, with the reason: the sample leaves them out."""


def sample(day: str) -> list[str]:
    names = sorted({entry.name for entry in entries()} - KNOWN.keys() - set(FAMILIES))
    return random.Random(day).sample(names, SAMPLE)


def entry_of(name: str):  # type: ignore[no-untyped-def]
    return next(entry for entry in entries() if entry.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES + CODES)
def test_tested_families_and_decoders_of_codes_are_right(name: str) -> None:
    result = check_apart(entry_of(name))
    assert result.outcome == "right", result
    assert result.layers >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sample(DAY))
def test_the_sample_of_the_day_holds_nothing_wrong(name: str) -> None:
    result = check_apart(entry_of(name))
    assert result.outcome != "wrong", f"PRUNEPATH_STRESS_DAY={DAY}: {result}"
    if result.outcome != "right":
        pytest.skip(f"{result.outcome}: {result.detail}")


def test_every_class_is_swept_once() -> None:
    found = entries()
    names = [entry.name for entry in found]
    assert len(names) == len(set(names)) > 1000
    assert entries(["MODEL_FOR_CAUSAL_LM"])[0].mapping == "MODEL_FOR_CAUSAL_LM"


def test_configs_shrink_by_meaning() -> None:
    found = dict(configs(LlamaConfig))
    small = found["small"]
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (32, LAYERS, VOCABULARY)
    assert found["few layers"].hidden_size == LlamaConfig().hidden_size
    assert found["two heads"].hidden_size == 2 * 128
    assert found["default"].vocab_size == LlamaConfig().vocab_size
    how, model = next(build(ViTModel, ViTConfig))
    assert how == "small"
    (inputs, *_) = requests(model)
    assert model(**inputs)[0].shape[-1] == 32


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that computes something else, and a class that cannot be built."""
    from torch_prunepath.layer import SparseFFN

    forward = SparseFFN.forward
    monkeypatch.setattr(SparseFFN, "forward", lambda self, x: forward(self, x) * (1 if float(self.tau) == 1 else 1.01))
    result = check(entry_of("LlamaModel"))
    assert (result.outcome, "is not the reference" in result.detail) == ("wrong", True)
    monkeypatch.setattr(SparseFFN, "forward", lambda self, x: 1.01 * forward(self, x))
    assert "tau = 1 is not the dense model" in check(entry_of("LlamaModel")).detail


def test_a_crash_is_a_line_of_the_table(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    from tests.stress import classes

    monkeypatch.setattr(classes, "check", lambda entry: os._exit(3))
    file = tmp_path / "out.jsonl"
    assert main(["--mapping", "MODEL", "--only", "LlamaModel", "--json", str(file)]) == 1
    (result,) = read(file)
    assert (result.outcome, result.detail) == ("wrong", "the process ended with 3")
    assert main(["--mapping", "MODEL", "--only", "LlamaModel", "--json", str(file)]) == 1  # it is not run again
    assert len(read(file)) == 1
    assert "| MODEL | 0 | 0 | 0 | 1 |" in capsys.readouterr().out
    assert "| all | 1 | 0 | 0 | 0 |" in table([Result("MODEL", "a", "A", "right", "")])


def _compute(entry: object) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("limit", "check", "detail"),
    [
        ("SECONDS", _compute, "more than 1 s of processor time"),
        ("WALL_SECONDS", lambda entry: time.sleep(60), "more than 1 s by the clock"),
    ],
)
def test_a_class_that_takes_too_long_is_not_built(limit, check, detail, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from tests.stress import classes

    monkeypatch.setattr(classes, "check", check)
    monkeypatch.setattr(classes, limit, 1)
    result = check_apart(entry_of("LlamaModel"))
    assert (result.outcome, result.detail) == ("not built", detail)


def test_models_that_draw_noise_are_compared_with_the_same_noise() -> None:
    from tests.stress.classes import answers

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"a": x + torch.randn(2), "b": [x, {"c": (x, 3)}], "ids": torch.tensor([1])}

    first, second = (answers(Noisy(), {"x": torch.ones(2)}) for _ in range(2))
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
