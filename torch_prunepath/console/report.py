"""What commands report: on what machine, with what model and text, and the table of results."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch_prunepath.discover.refusal import Refusal, in_one_line

PACKAGES = ("torch-prunepath", "torch", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    return {
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}),
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_bytes(model: Any) -> int:
    """Bytes of the model's parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def model(name: str, model: Any) -> dict[str, Any]:
    """What the model is."""
    parameter = next(model.parameters())
    return {
        "name": name,
        "type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def text(name: str, fit_NC: Any, test_NC: Any) -> dict[str, Any]:
    """What was read: N windows of C tokens."""
    return {
        "name": name,
        "calibration_tokens": fit_NC.numel(),
        "held_out_tokens": test_NC.numel(),
        "context": test_NC.shape[1],
    }


def heading(results: Mapping[str, Any]) -> list[str]:
    """The lines above the table."""
    model, text, hardware = results["model"], results["text"], results["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"model       {model['name']} ({model['parameters'] / 1e6:.1f} M parameters, {model['dtype']})",
        f"text        {text['name']} ({text['calibration_tokens']} tokens for calibration, "
        f"{text['held_out_tokens']} held out)",
        f"hardware    {hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads",
        f"versions    {versions}",
    ]


def skipped(entries: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines that say which FFNs stayed dense, and why; none if all were made sparse."""
    if not entries:
        return []
    told = in_one_line([Refusal(entry["name"], entry["reason"]) for entry in entries])
    return [f"still dense {told}"]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a row of tau, sparsity, perplexity and decoding speed; bytes read as well where bytes were asked for."""
    shown = {"sparsity": ("sparsity", ".1%"), "bytes": ("bytes read", ".1%"), "perplexity": ("perplexity", ".2f")}
    shown["tokens_per_second"] = ("tokens/s", ".1f")
    if not any("target_bytes" in row for row in rows):
        del shown["bytes"]
    lines = [("", *(title for title, _ in shown.values()))]
    lines += [(row["name"], *(format(row[key], form) for key, (_, form) in shown.items())) for row in rows]
    return list(aligned(lines))


def settings(tau: float | None, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The lines of tau and thresholds.

    Args:
        tau: the model's tau, or None where layers have their own.
        found: what :func:`torch_prunepath.evaluation.make_sparse.in_force` returns, by the same keys.
    """
    lines = [f"tau         {_span(found['tau_per_layer'].values()) if tau is None else f'{tau:.6g}'}"]
    theta_x, theta_h = (found[f"{knob}_per_layer"].values() for knob in ("theta_x", "theta_h"))
    if any(theta_x) or any(theta_h):
        lines.append(f"thresholds  on inputs {_span(theta_x)}; on neurons {_span(theta_h)}")
    return lines


def _span(values: Collection[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}, layer by layer"


def aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
