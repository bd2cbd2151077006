"""Progress bars are shown, or not, as the caller and the environment say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_llama import tiny_llama

from torch_prunepath import sparsify
from torch_prunepath.progress import progress_bar


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_as_the_caller_says(progress: bool | None, shown: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), progress=progress, desc="counting")) == [0, 1, 2]
    assert ("counting" in capfd.readouterr().err) == shown


def test_the_environment_hides_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    sparsify(tiny_llama())
    assert "building experts" in capfd.readouterr().err
    code = "from tiny_llama import tiny_llama; from torch_prunepath import sparsify; sparsify(tiny_llama())"
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "%|" not in done.stderr and "building experts" not in done.stderr
