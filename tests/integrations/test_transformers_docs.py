"""The examples of docs/transformers.md, run one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import run_blocks

from torch_prunepath import sparse_layers


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three layers: one that is neither the first nor the last.
    blocks, names = run_blocks("transformers.md", tmp_path, monkeypatch, layers=3)
    assert blocks == 8
    assert len(sparse_layers(names["model"])) == 3
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "| layer | neurons | experts | tau | sparsity |" in card
