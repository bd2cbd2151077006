"""The work of ``prunepath info``: what a sparse checkpoint is, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_prunepath.checkpoint import read_info
from torch_prunepath.commands.options import InfoOptions
from torch_prunepath.console import report
from torch_prunepath.console.errors import as_user_error
from torch_prunepath.evaluation.models import refuse_file


def run(options: InfoOptions, command_line: str = "") -> dict[str, Any]:
    """What the checkpoint is, ready for JSON.

    Raises:
        ValueError: if there is no sparse checkpoint.
    """
    refuse_file(str(options.folder))
    with as_user_error(OSError):
        return {"command": "info", "checkpoint": str(options.folder), **read_info(options.folder)}


def render(results: Mapping[str, Any]) -> str:
    """The results of :func:`info` as people read them."""
    settings = ", ".join(f"{name} {value}" for name, value in results["config"].items())
    head = ("layer", "neurons", "experts", "expert size", "rule", "tau")
    keys = ("name", "ffn_size", "experts", "expert_size", "rule")
    rows = [(*(str(layer[key]) for key in keys), f"{layer['tau']:.6g}") for layer in results["layers"]]
    lines = [
        f"checkpoint  {results['checkpoint']} (format {results['format_version']}, {len(rows)} sparse layers)",
        f"made with   {settings}",
        "",
        *report.aligned([head, *rows]),
    ]
    return "\n".join(lines)
