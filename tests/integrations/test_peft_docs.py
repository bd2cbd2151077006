"""The examples of docs/adapters.md, run one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import run_blocks

from torch_prunepath import sparse_layers


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, names = run_blocks("adapters.md", tmp_path, monkeypatch)
    assert blocks > 8
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter", "sparse", "lora", "both", "out"}
    assert len(sparse_layers(names["sparse"])) == 2
