"""The benchmark of distillation's loss: what it runs, and that nothing wrong is timed."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import distillation

SMALL = ["--device", "cpu", "--tokens", "70", "--vocabulary", "33", "--seconds", "0.01"]


@pytest.mark.parametrize("dtype", distillation.DTYPES)
def test_every_way_that_a_cpu_has(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distillation.main([*SMALL, "--dtype", dtype, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in results["rows"]] == ["operators", "compiled"]
    assert all(row["ms"] >= row["least_ms"] > 0 for row in results["rows"]) and results["floor_ms"] > 0
    assert distillation.main([*SMALL, "--dtype", dtype, "--chunk", "9"]) == 0
    assert "70 x 33 logits" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def ways(*_: object) -> dict[str, Any]:
        return {"wrong": lambda student, *_: (torch.zeros(()), torch.zeros_like(student))}

    with mock.patch.object(distillation, "ways", ways):
        assert distillation.main(SMALL) == 2
    assert "wrong: the gradient is off by 1.0e+00" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokens", "vocabulary", "chunk", "seconds"])
def test_numbers_must_be_positive(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distillation.main([*SMALL, f"--{name}", "0"]) == 2
    assert f"--{name} 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert distillation.main([]) == 2
    assert "give --device cpu" in capsys.readouterr().err
