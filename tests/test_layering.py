"""Imports go one way: a room uses only rooms above it. A room is a folder of the package, or a file at its root."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_prunepath"
APART = {"csrc_triton": ROOT / "csrc_triton", "integrations": ROOT / "integrations"}
"""Folders beside the package that are installed below it."""

ROOMS = [
    "progress",
    "on_import",
    "activations",
    "config",
    "weights",
    "rms",
    "select",
    "search",
    "quantiles",
    "csrc_triton",
    "ops",
    "compile",
    "layer",
    "discover",
    "inputs",
    "shares",
    "sparsity",
    "thresholds",
    "experts",
    "budget",
    "conversion",
    "card",
    "integrations.transformers",
    "checkpoint",
    "train",
    "integrations.peft",
    "integrations.torchao",
    "baselines",
    "console",
    "evaluation",
    "integrations.lm_eval",
    "bench",
    "commands",
]


def modules() -> dict[str, Path]:
    """Every module below ``torch_prunepath``, by its dotted name there; packages under their own."""
    found = {}
    for prefix, folder in [("", PACKAGE), *((f"{name}.", folder) for name, folder in APART.items())]:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name.rstrip(".")] = path
    # The fronts of the whole package and of the integrations are no rooms: they only bring others together.
    return {name: path for name, path in found.items() if name not in ("", "__main__", "integrations")}


def room_of(module: str) -> str | None:
    """The room that a module is in; one integration is a room, its helpers (``peft_layer``) included."""
    return next((room for room in ROOMS if module == room or module.startswith((f"{room}.", f"{room}_"))), None)


def imported(path: Path) -> set[str]:
    """Dotted names below the package that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch_prunepath":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("torch_prunepath.") for name in names if name.startswith("torch_prunepath.")}


def test_every_module_is_in_a_room() -> None:
    assert {name for name in modules() if room_of(name) is None} == set()
    assert {room_of(name) for name in modules()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_from_rooms_above(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for module, path in modules().items():
        if room_of(module) == room:
            used = {room_of(name) for name in imported(path)} - {None}
            assert used <= allowed, f"{module} uses {used - allowed}"


def test_importing_the_package_is_lean() -> None:
    """No CUDA context, no kernels, no optional dependency."""
    code = (
        "import sys, torch, torch_prunepath\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'peft', 'lm_eval', 'matplotlib', 'gguf', 'torch._inductor'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "docs")
