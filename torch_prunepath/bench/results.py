"""The report of both benchmarks: metadata, JSON, table and plot."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torch_prunepath.bench.options import BenchOptions
from torch_prunepath.console import report
from torch_prunepath.console.output import RESULTS, is_output_of, output_folder, writing
from torch_prunepath.console.plot import new_figure

PLOT = "speedup.png"
"""Name of the plot's file in the output folder."""


def begin(command: str, options: BenchOptions, command_line: str, bandwidth: float) -> dict[str, Any]:
    """Start the results: metadata, and no rows yet."""
    machine = report.machine()
    machine["versions"]["triton"] = _version("triton")
    return {
        "command": f"bench {command}",
        "command_line": command_line,
        **machine,
        "commit": commit(),
        "device": options.device,
        "dtype": options.dtype,
        "copy_bandwidth_bytes_per_s": bandwidth,
        "geometries": {},
        "rows": [],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this file's checkout, with "-dirty" if files differ; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def announce(row: Mapping[str, Any]) -> None:
    """Write the row to standard error at once, as a long run may end before its table."""
    tqdm.write("  ".join(_cells(row)), file=sys.stderr)


def finish(results: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Write the results and their plot, if a folder is wanted.

    Raises:
        UserError: if the folder cannot be written.
    """
    if output is None:
        return results
    with output_folder(output, ours=is_output_of("bench")) as folder, writing(output):
        results["output"] = str(output)
        results["plot"] = _plot(results, folder, output)
        (folder / RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def render(results: Mapping[str, Any]) -> str:
    """Render the results as text for people."""
    hardware = results["hardware"]
    chip = hardware.get("gpu") if results["device"] == "cuda" else f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [f"hardware   {chip}", f"versions   {versions}"]
    lines += [f"bandwidth  {results['copy_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, read and written by a large copy"]
    lines += [f"{name}: {about['weights']}" for name, about in results["geometries"].items()]
    lines += ["", *report.aligned([_HEAD, *map(_cells, results["rows"])])]
    for prompt in results.get("prompts", []):
        lines.append(_prompt_line(prompt))
    lines += [f"not timed  {reason}" for reason in results.get("skipped", [])]
    if "profile" in results:
        lines += ["", f"profile    {results['profile']}"]
    if "output" in results:
        lines += ["", f"output     {results['output']}"]
    return "\n".join(lines)


_HEAD = (
    *("", "dtype", "what", "sparsity", "real", "dense us", "sparse us"),
    *("speed-up", "floor", "kappa", "dense bw", "sparse bw", "peak MB"),
)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    peak = row["peak_bytes"]
    return (
        row["geometry"],
        row["dtype"],
        f"{row['phase']} {row['tokens']}" if row["phase"] == "prefill" else f"batch {row['batch']}",
        f"{row['sparsity']:.0%}",
        f"{row['realised_sparsity']:.1%}",
        f"{row['dense_us']:.1f}",
        f"{row['sparse_us']:.1f}",
        f"{row['speedup']:.2f}x",
        f"{row['floor_speedup']:.2f}x",
        f"{row['kappa']:.2f}",
        f"{row['dense_bandwidth_share']:.0%}",
        f"{row['sparse_bandwidth_share']:.0%}",
        "?" if peak is None else f"{peak / 1e6:.0f}",
    )


def _prompt_line(prompt: Mapping[str, Any]) -> str:
    return (
        f"{prompt['geometry']} prompt {prompt['prompt']} ({prompt['prompt_tokens']} tokens) "
        f"at {prompt['sparsity']:.0%}: latency {prompt['dense_latency_ms']:.1f} -> "
        f"{prompt['sparse_latency_ms']:.1f} ms, {prompt['dense_tokens_per_s']:.1f} -> "
        f"{prompt['sparse_tokens_per_s']:.1f} tokens/s"
    )


def lines_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group the rows by the line of the plot that joins them, in order of realised sparsity; keys are labels."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        what = f"{row['phase']} {row['tokens']}" if row["phase"] == "prefill" else f"batch {row['batch']}"
        groups.setdefault(f"{row['geometry']}, {what}", []).append(row)
    return {label: sorted(group, key=lambda row: row["realised_sparsity"]) for label, group in groups.items()}


def _plot(results: Mapping[str, Any], folder: Path, output: Path) -> str | None:
    """Save the plot and return its path; without matplotlib, print how to install it and return None."""
    figure = new_figure(7, 4.5)
    if figure is None:
        return None
    axes = figure.subplots()
    for label, group in lines_of(results["rows"]).items():
        across = [100 * row["realised_sparsity"] for row in group]
        (line,) = axes.plot(across, [row["speedup"] for row in group], "o-", label=label)
        axes.plot(across, [row["floor_speedup"] for row in group], "--", color=line.get_color(), alpha=0.6)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set(xlabel="inactive share of FFN neurons (%)", ylabel="speed-up over dense (dashed: memory floor)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.legend(fontsize="small")
    figure.savefig(folder / PLOT, dpi=150)
    return str(output / PLOT)


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row if every number in it is finite.

    Raises:
        ValueError: if a number is not finite.
    """
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise ValueError(f"{bad[0]} of {row['geometry']} is {row[bad[0]]}: the clock gave no usable time")
    return row
