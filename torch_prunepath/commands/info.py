"""The work of ``prunepath info``: what a sparse checkpoint is, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch_prunepath.checkpoint import read_info
from torch_prunepath.commands.options import InfoOptions
from torch_prunepath.console import report
from torch_prunepath.console.errors import as_user_error
from torch_prunepath.evaluation.models import refuse_file

THRESHOLDS: Mapping[str, str] = MappingProxyType({"theta_x": "threshold on inputs", "theta_h": "threshold on neurons"})
"""Columns that are shown where any layer has thresholds."""


def run(options: InfoOptions, command_line: str = "") -> dict[str, Any]:
    """What the checkpoint is, ready for JSON.

    Raises:
        ValueError: if there is no sparse checkpoint.
    """
    refuse_file(str(options.folder))
    with as_user_error(OSError):
        return {"command": "info", "checkpoint": str(options.folder), **read_info(options.folder)}


def _any_thresholds(results: Mapping[str, Any]) -> bool:
    return any(layer[knob] for layer in results["layers"] for knob in THRESHOLDS)


def render(results: Mapping[str, Any]) -> str:
    """The results of :func:`info` as people read them."""
    settings = ", ".join(f"{name} {value}" for name, value in results["config"].items())
    keys = {"name": "layer", "ffn_size": "neurons", "experts": "experts", "expert_size": "expert size", "rule": "rule"}
    knobs = {"tau": "tau", **THRESHOLDS} if _any_thresholds(results) else {"tau": "tau"}
    rows = [
        (*(str(layer[key]) for key in keys), *(f"{layer[knob]:.6g}" for knob in knobs)) for layer in results["layers"]
    ]
    head = (*keys.values(), *knobs.values())
    lines = [
        f"checkpoint  {results['checkpoint']} (format {results['format_version']}, {len(rows)} sparse layers)",
        f"made with   {settings}",
        "",
        *report.aligned([head, *rows]),
    ]
    return "\n".join(lines)
