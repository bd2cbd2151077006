"""Kernel tests run compiled on a CUDA device, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NO_DEVICE = "no CUDA device: run `tox -e interpret`, or set TRITON_INTERPRET=1 in a process of its own"


def _device() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _device() is not None or os.environ.get("PRUNEPATH_REQUIRE_GPU") == "1":
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))


@pytest.fixture
def device() -> str:
    """Where kernels run in this process."""
    device = _device()
    assert device is not None, "PRUNEPATH_REQUIRE_GPU=1, but torch finds no CUDA device"
    return device
