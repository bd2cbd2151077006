"""Running the Python blocks of a page of docs/ that need more around them than tests/test_docs.py gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, layers: int = 2
) -> tuple[int, dict[str, Any]]:
    """Run them in order in one namespace, in ``folder``, offline; how many they are, and the names they leave.

    They find ``name``, the folder of a tiny model of so many layers, and ``texts``.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {
        "name": str(save_tiny_llama(folder / "base", layers)),
        "texts": [f"{'abcdefghij' * i} is a text, and {i} is its number." for i in range(1, 9)],
    }
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return len(blocks), names
