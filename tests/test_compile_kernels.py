"""Every kernel compiles for GPUs that need not be there; a process of its own, without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = {
    "_router_one",
    "_router_split",
    "_rank",
    "_select",
    "_up",
    "_down",
    "_list",
    "_masked",
    "_linears_one",
    "_divergence",
}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("tools") / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script, target], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout)) == KERNELS
