"""The page of the first hour: it shows the script that is run here, and what is run here looks as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first-hour.md"
EXAMPLES = ROOT / "examples"
SMALL = {
    "QUESTIONS": "8",
    "STEPS": "2",
    "SETTINGS": "--partition contiguous --budget uniform --calibration-tokens 1024",
}
"""Little data, and experts that are as neurons lie: a minute in place of many."""

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"(dense|(?:un)?trained-\S+) +([\d.]+)% +([\d.]+) +([\d.]+) +([\d.]+)%")


def blocks(language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if found == language]


def rows_of(output: str) -> dict[str, list[float]]:
    """The table of the last step: sparsity, perplexity of a word and of a byte, right answers."""
    return {name: [float(number) for number in numbers] for name, *numbers in ROW.findall(output)}


def shape(output: str) -> list[str]:
    """The lines without what differs from run to run: numbers, lm-eval's tables, and the text that is written."""
    lines = re.sub(r"\s*\d[\d.,]*", " #", output.partition("The Python programming")[0]).splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith(("|", "hardware", "versions"))]


def test_the_page_shows_the_script() -> None:
    commands = "".join(blocks("bash"))
    script = (EXAMPLES / "first_hour.sh").read_text(encoding="utf-8")
    wanted = [line for line in script.splitlines() if line and not line.startswith(("#", "set "))]
    assert [line for line in commands.splitlines() if line] == wanted


def test_the_page_shows_what_trains_loads_and_writes() -> None:
    shown = blocks("python")
    for name in ("train.py", "merge.py", "generate.py"):
        assert (EXAMPLES / "first_hour" / name).read_text(encoding="utf-8") in shown, name


def assert_holds(rows: dict[str, list[float]]) -> None:
    """What is true of every run, small or large."""
    assert list(rows) == ["dense", "trained-0.8", "trained-0.9", "trained-1", "untrained-0.8"]
    assert rows["trained-1"] == pytest.approx(rows["dense"], rel=1e-3)
    sparsity, perplexity = ({name: row[i] for name, row in rows.items()} for i in (0, 1))
    assert sparsity["trained-1"] == 0 < sparsity["trained-0.9"] < sparsity["trained-0.8"] < 100
    assert perplexity["dense"] < perplexity["trained-0.9"] < perplexity["trained-0.8"]


def test_what_the_page_says_holds() -> None:
    assert_holds(rows_of("".join(blocks("text"))))


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[str]:
    """What the script prints on standard output, in a folder with nothing but the examples."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | SMALL | {"PATH": path, "HF_HOME": str(tmp_path / "cache")}
    command = ["bash", "examples/first_hour.sh"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    yield shown.stdout
    assert (tmp_path / "first-hour" / "trained" / "model.safetensors").is_file()
    adapter = tmp_path / "first-hour" / "adapter" / "adapter_model.safetensors"
    assert adapter.stat().st_size < 0.05 * (tmp_path / "first-hour" / "base" / "model.safetensors").stat().st_size


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to run the script with")
def test_the_script_prints_what_the_page_shows(outputs: str) -> None:
    assert_holds(rows_of(outputs))
    assert shape(outputs) == shape("".join(blocks("text")))
    assert "The Python programming language is" in outputs
    assert float(re.findall(r"([\d.]+)% of the FFN neurons were left out", outputs)[0]) > 0
