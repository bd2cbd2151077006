"""The examples of docs/transformers.md, run one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama

from torch_prunepath import sparse_layers

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {
        "name": str(save_tiny_llama(tmp_path / "base")),
        "texts": [f"{'abcdefghij' * i} is a text, and {i} is its number." for i in range(1, 9)],
    }
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(sparse_layers(names["model"])) == 2
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "| layer | neurons | experts | tau | sparsity |" in card
