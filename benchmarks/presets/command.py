"""The command line of every figure: what would run and what it costs, the experiment, or a stand-in for it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.jobs import check_positive
from benchmarks.harness.options import check_device, dispatch, parser_of
from benchmarks.harness.report import markdown
from benchmarks.presets.cost import TFLOPS, Cost, costs_of, summary
from benchmarks.presets.preset import Part, Preset
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import aligned


def main_of(preset: Preset, argv: Sequence[str] | None = None) -> int:
    """Run a figure's command; the exit code."""
    return dispatch(preset.name, parser(preset), {"run": lambda arguments, line: work(preset, arguments, line)}, argv)


def parser(preset: Preset) -> argparse.ArgumentParser:
    """The command line of a figure."""
    found = parser_of(preset.name, f"{preset.title}; settings and their sources: --settings")
    add = found.add_argument
    add("--dry-run", action="store_true", help="print every run and its cost; needs neither network nor weights")
    add("--settings", action="store_true", help="print every setting and where it comes from")
    add("--stand-in", action="store_true", help="run on a tiny random model and made-up data: a test of the code")
    add("--model", metavar="DIR", help=f"folder of the model (default: {preset.model.name} from the hub)")
    add("--data", type=Path, metavar="DIR", help="folder of the data (default: the hub, kept in OUT/data)")
    add("-o", "--output", type=Path, metavar="OUT", help="folder of the results; runs that it holds are not done again")
    add("--seeds", type=int, nargs="+", help="in place of the preset's")
    add("--steps", type=int, help="of every run, in place of the preset's length")
    add("--batch", type=int, help="rows a step, in place of the preset's")
    text = f"10^12 operations a second that a card sustains, for the hours of --dry-run (default: {TFLOPS:g})"
    add("--tflops", type=float, default=TFLOPS, help=text)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", nargs="?", const="default", metavar="HOW", help="train compiled, in this mode of torch.compile")
    add("--commit", help="what results say they were made from (default: git's answer)")
    add("--json", action="store_true", help="print one JSON object")
    return found


def work(preset: Preset, arguments: argparse.Namespace, command_line: str) -> str:
    """Do what was asked; what to print.

    Raises:
        UserError: if something is refused or missing.
    """
    check_positive({name: getattr(arguments, name) for name in ("tflops", "steps", "batch")})
    preset = changed(preset, arguments)
    if arguments.settings:
        return settings(preset, arguments.json)
    if arguments.dry_run:
        return dry_run(preset, arguments.tflops, arguments.json)
    if arguments.output is None:
        raise UserError(f"{preset.name} needs a folder for its results: name it with -o, or give --dry-run")
    check_device(arguments.device)
    from benchmarks.presets.work import run

    return run(preset, arguments, command_line)


def changed(preset: Preset, arguments: argparse.Namespace) -> Preset:
    """The preset as the options change it; a stand-in is small before they do."""
    if arguments.stand_in:
        from benchmarks.presets.stand_in import shrunk

        preset = shrunk(preset)
    if arguments.seeds:
        preset = preset.changed(seeds=tuple(dict.fromkeys(arguments.seeds)))
    if arguments.steps:
        preset = preset.changed(steps=arguments.steps, epochs=None)
    return preset.changed(batch=arguments.batch) if arguments.batch else preset


def settings(preset: Preset, as_json: bool) -> str:
    """Every setting and where it comes from."""
    if as_json:
        return json.dumps([dataclasses.asdict(given) for given in preset.given])
    rows = [(given.name, given.value, given.origin, given.note) for given in preset.given]
    return "\n".join(markdown(("setting", "value", "from", "note"), rows))


def dry_run(preset: Preset, tflops: float, as_json: bool) -> str:
    """Every run and its cost, and the sums."""
    costs = costs_of(preset)
    total = summary(costs, preset, tflops)
    if as_json:
        return json.dumps({**total, "each": [_numbers(part, cost, tflops) for part, cost in costs]})
    rows = [_cells(_numbers(part, cost, tflops)) for part, cost in costs]
    head = ("part", "task", "method", "sparsity", "lr", "seed", "steps", "trained", "read", "FLOPs", "hours")
    notes = [
        f"{preset.title}: {len(costs)} runs of {preset.model.name}, {total['parameters'] / 1e6:,.0f} million",
        f"parameters, of which every token is multiplied by {total['multiplied'] / 1e6:,.0f} million.",
        f"{total['trained_tokens']:.3g} tokens forward and backward, {total['read_tokens']:.3g} forward only: "
        f"{total['flops']:.3g} FLOPs.",
        f"About {total['hours']:,.1f} hours of one card that sustains {tflops:g} TFLOP/s (--tflops; by default what an "
        "H100 reached in",
        "benchmarks/results/training-h100.md). Weights, gradients and AdamW in float32: "
        f"{total['memory_gb']:,.1f} GB besides activations.",
    ]
    return "\n".join([*aligned([head, *rows]), "", *notes])


def _numbers(part: Part, cost: Cost, tflops: float) -> dict[str, Any]:
    run = dataclasses.asdict(cost.run)
    numbers = {"steps": cost.steps, "trained_tokens": cost.trained, "read_tokens": cost.read, "flops": cost.flops}
    return {"part": part.kind, **run, **numbers, "hours": cost.hours(tflops)}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shares = " ".join(f"{share:.0%}" for share in row["sparsity"]) or "dense"
    about = (row["part"], row["task"], row["method"], shares, f"{row['lr']:g}", str(row["seed"]), f"{row['steps']:,}")
    costs = (f"{row[name]:.2e}" for name in ("trained_tokens", "read_tokens", "flops"))
    return (*about, *costs, f"{row['hours']:.2f}")
