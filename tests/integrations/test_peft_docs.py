"""The examples of docs/adapters.md, run one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama

from torch_prunepath import sparse_layers

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {
        "name": str(save_tiny_llama(tmp_path / "base")),
        "texts": [f"{'abcdefghij' * i} is a text, and {i} is its number." for i in range(1, 9)],
    }
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) > 8
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter", "sparse", "lora", "both", "out"}
    assert len(sparse_layers(names["sparse"])) == 2
