"""What several commands are tried with: a tiny model and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import save_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of some thousand bytes, each a token."""
    path = tmp_path / "text"
    path.write_text("".join(f"Line {i} of a text about {i * i % 97}.\n\n" for i in range(200)))
    return path
