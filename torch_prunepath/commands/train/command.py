"""``prunepath train`` as the command line has it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch_prunepath.console.settings import add_settings, given_settings

SUMMARY = "Train a sparse model, or a dense one made sparse first, and save the checkpoint."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    add = command.add_argument
    add("model", metavar="MODEL", help="name or folder of a causal language model, dense or sparse, or a GGUF file")
    add("-o", "--output", type=Path, required=True, help="folder to write; must not exist, or be empty")
    add("--recipe", default="ours", help="ours (for many sparsities; default), held (for one), paper, lte")
    add(
        "--target-sparsity",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="that tau is set to at the end (default: 0.7)",
    )
    add("--resume", action="store_true", help="go on with an unfinished run to the same output")
    add("--save-every", type=int, default=500, metavar="STEPS", help="save the unfinished run (default: every 500)")
    _add_data(command.add_argument_group("data"))
    _add_training(command.add_argument_group("training"))
    add_settings(command, ", in place of the recipe's", leave_out=["seed"])


def _add_data(group: Any) -> None:
    text = group.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", help="UTF-8 text to train on")
    text.add_argument("--dataset", metavar="NAME", help="data set to train on, by the name that datasets knows")
    group.add_argument("--subset", metavar="NAME", help="configuration of the data set")
    group.add_argument("--split", default="train", help="of the data set (default: train)")
    group.add_argument("--text-column", default="text", metavar="NAME", help="of the data set (default: text)")
    group.add_argument("--eval-text", metavar="FILE", help="UTF-8 text to measure perplexity on, before and after")
    group.add_argument("--context", type=int, default=512, metavar="TOKENS", help="of a window (default: 512)")


def _add_training(group: Any) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument("--tokens", type=int, help="tokens to train on")
    length.add_argument("--epochs", type=float, help="passes over the text, in each stage (default: 1)")
    group.add_argument("--batch", type=int, default=8, metavar="WINDOWS", help="windows a batch (default: 8)")
    group.add_argument("--accumulation", type=int, default=1, metavar="BATCHES", help="batches a step (default: 1)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: the recipe's)")
    group.add_argument("--router-lr", type=float, help="of routers (default: the recipe's)")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="fields", help="of the recipe or TrainConfig"
    )
    group.add_argument(
        "--distil",
        type=float,
        nargs="?",
        const=1.0,
        metavar="WEIGHT",
        help="learn from the dense model too, which takes more time and memory; 0: do not (default: 1 for ours and "
        "held if MODEL is dense, else 0)",
    )
    group.add_argument("--teacher", metavar="MODEL", help="the dense model for --distil, where it is not MODEL")
    group.add_argument("--routers-only", action="store_true", help="leave all weights but the routers' as they are")
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay in float32")
    group.add_argument(
        "--compile",
        nargs="?",
        const="default",
        metavar="HOW",
        help="less time a step, after a minute or two: a mode of torch.compile (default: default) or a backend",
    )
    group.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--device", help="where to run (default: cuda if there is any, else cpu)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


def job(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the command; return its results and their text."""
    import torch

    from torch_prunepath.commands.train.job import render, run
    from torch_prunepath.commands.train.plan import Options
    from torch_prunepath.commands.train.source import Source

    rates = {name: getattr(arguments, name) for name in ("lr", "router_lr")}
    same = [
        *("model", "eval_text", "output", "recipe", "target_sparsity", "steps", "tokens", "epochs", "batch"),
        *("accumulation", "context", "distil", "teacher", "routers_only", "bf16", "compile", "checkpointing", "seed"),
        *("save_every", "resume"),
    ]
    options = Options(
        source=Source(arguments.text, arguments.dataset, arguments.subset, arguments.split, arguments.text_column),
        fields=[*(f"{name}={value}" for name, value in rates.items() if value is not None), *arguments.fields],
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        settings=given_settings(arguments),
        **{name: getattr(arguments, name) for name in same},
    )
    results = run(options, arguments.command_line)
    return results, render(results)
