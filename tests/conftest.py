"""What tests need: a CUDA device, a data folder. Absence skips a test with its reason, or fails it if promised."""

from __future__ import annotations

import os

import pytest
import torch

# The tests' tensors are tiny: a second thread gains nothing, and costs much where other processes keep the cores busy.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        _need_gpu()
    if item.get_closest_marker("shared_data") is not None and "PRUNEPATH_DATA" not in os.environ:
        pytest.skip("PRUNEPATH_DATA does not name a folder of data sets")


def _need_gpu() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("PRUNEPATH_REQUIRE_GPU") == "1":
        pytest.fail("PRUNEPATH_REQUIRE_GPU=1, but torch finds no CUDA device")
    pytest.skip("no CUDA device")
