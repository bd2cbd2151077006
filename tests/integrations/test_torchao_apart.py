"""test_torchao.py and its row of docs/mistakes.md, in a process that finds torchao, installed in a folder of its own.

Where torchao is installed, transformers imports it, and Triton with it, in every process that imports this package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TORCHAO = "torchao==0.18.0"
ROW = "test_mistakes.py::test_message_is_the_documented_one[torchao's own quantize_ on a sparse model]"


@pytest.mark.network
@pytest.mark.skipif(sys.platform != "linux", reason="torchao has wheels for Linux and Macs with Apple's processors")
def test_with_torchao(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), TORCHAO]
    subprocess.run(install, check=True)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    tests = [str(HERE / "test_torchao.py"), str(HERE / ROW)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    found = subprocess.run(
        command, cwd=HERE.parents[1], env=os.environ | {"PYTHONPATH": path}, text=True, capture_output=True
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout and "skipped" not in found.stdout and "failed" not in found.stdout
