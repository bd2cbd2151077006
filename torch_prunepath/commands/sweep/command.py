"""``prunepath sweep`` as the command line has it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch_prunepath.commands.sweep.options import TAUS, Options
from torch_prunepath.console.settings import add_settings, given_settings

SUMMARY = "Evaluate lm-eval tasks over a list of tau or of sparsities, and draw the curve."
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    command.add_argument("model", metavar="MODEL", help="name or folder of a causal language model, or a GGUF file")
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="lm-eval's tasks, groups or tags")
    points = command.add_mutually_exclusive_group()
    points.add_argument(
        "--tau", type=float, nargs="+", metavar="TAU", help=f"thresholds (default: {' '.join(map(str, TAUS))})"
    )
    points.add_argument("--sparsity", type=float, nargs="+", metavar="SHARE", help="sparsities to find the tau of")
    command.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: Python's help topics)")
    command.add_argument("--limit", type=float, metavar="N", help="documents of each task, or their share if below 1")
    command.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's own)")
    command.add_argument("--include-path", metavar="DIR", help="folder with more tasks")
    command.add_argument("--batch-size", default="1", metavar="N", help="sequences a batch, or auto (default: 1)")
    command.add_argument("--device", help="where to run (default: cuda if there is any, else cpu)")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto)")
    command.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for results.json and the plot")
    add_settings(command, ", for a dense model")


def job(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the command; return its results and their text."""
    from torch_prunepath.commands.sweep.run import render, run

    options = Options(
        model=arguments.model,
        tasks=[name for task in arguments.tasks for name in task.split(",") if name],
        taus=arguments.tau,
        sparsities=arguments.sparsity,
        text=arguments.text,
        settings=given_settings(arguments),
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        output=arguments.output,
    )
    results = run(options)
    return results, render(results)
