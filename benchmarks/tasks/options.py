"""The options that the benchmarks on tasks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.options import add_compile, changes, check_device, check_positive, check_shares
from benchmarks.common.store import digest_of_model
from benchmarks.tasks.methods import METHODS, check
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.train.compiling import check_how


@dataclass(frozen=True)
class Options:
    """What was asked, for all tasks.

    Attributes:
        model: what the results call the model.
        weights: digest of its files.
        output: the folder.
        methods: names in ``METHODS``.
        sparsity: targets.
        seeds: one set of runs for each.
        steps: optimiser steps of the fine-tuning, and of each method after it; None: by epochs.
        epochs: passes over the training data instead.
        lr: learning rates of the methods; more than one compete on the selection half.
        dense_lr: likewise of the fine-tuning.
        fields: settings of each method.
        batch: rows a batch.
        autocast: train in bfloat16 autocast.
        compile: train compiled, in this mode of ``torch.compile``; None: do not.
        commit: what the results say they were made from; None: git's answer.
        progress: show progress bars of single runs.
    """

    model: str
    weights: str
    output: Path
    methods: Sequence[str]
    sparsity: Sequence[float]
    seeds: Sequence[int]
    steps: int | None
    epochs: float | None
    lr: Sequence[float]
    dense_lr: Sequence[float]
    fields: Mapping[str, Mapping[str, Any]]
    batch: int
    autocast: bool
    compile: str | None
    commit: str | None
    progress: bool


def add_options(parser: argparse.ArgumentParser, *, batch: int, lr: float) -> None:
    """The options that both benchmarks have."""
    add = parser.add_argument
    add("--model", required=True, help="folder of the pretrained model")
    add("--data", type=Path, required=True, help="folder of the data")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--sparsity", type=float, nargs="+", default=[0.8, 0.9], help="shares of FFN neurons to leave out")
    add("--seeds", type=int, nargs="+", default=[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps of the fine-tuning, and of each method after it")
    length.add_argument("--epochs", type=float, help="passes over the training data instead (default: 3)")
    add("--lr", type=float, nargs="+", default=[lr], help="of the methods; several compete on the selection half")
    add("--dense-lr", type=float, nargs="+", default=[lr], help="of the fine-tuning before; several compete likewise")
    add("--batch", type=int, default=batch, help="rows a training batch")
    settings = parser.add_argument("--set", dest="fields", action="append", default=[], metavar="[METHOD.]FIELD=VALUE")
    settings.help = "a field of the method's training or experts; without METHOD, of every method that has it"
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="train in bfloat16 autocast; weights and evaluation stay in float32")
    add_compile(parser)
    add("--commit", help="what the results say they were made from (default: git's answer)")
    add("-o", "--output", type=Path, required=True, help="folder of the results; runs that it holds are not done again")
    add("--quiet", action="store_true", help="no progress bars for single runs")
    add("--json", action="store_true", help="print one JSON object")


def options_of(arguments: argparse.Namespace) -> Options:
    """What the command line asked, checked before anything heavy runs.

    Raises:
        UserError: with a remedy.
    """
    _check(arguments)
    methods = list(dict.fromkeys(arguments.methods))
    fields = changes(arguments.fields, {method: METHODS[method].fields for method in methods})
    with as_user_error(ValueError, TypeError):
        for method in methods:
            for lr in (*arguments.lr, *arguments.dense_lr):
                check(method, fields[method], arguments.steps or 2, lr, arguments.compile)
    return Options(
        model=Path(arguments.model).name,
        weights=digest_of_model(Path(arguments.model)),
        output=arguments.output,
        methods=methods,
        sparsity=sorted(set(arguments.sparsity)),
        seeds=list(dict.fromkeys(arguments.seeds)),
        steps=arguments.steps,
        epochs=None if arguments.steps else arguments.epochs or 3.0,
        lr=list(dict.fromkeys(arguments.lr)),
        dense_lr=list(dict.fromkeys(arguments.dense_lr)),
        fields=fields,
        batch=arguments.batch,
        autocast=arguments.bf16,
        compile=arguments.compile,
        commit=arguments.commit,
        progress=not (arguments.quiet or arguments.json),
    )


def _check(arguments: argparse.Namespace) -> None:
    check_positive({name: getattr(arguments, name) for name in ("steps", "epochs", "batch")})
    check_shares(arguments.sparsity)
    if not Path(arguments.model).exists():
        raise UserError(f"there is no model {arguments.model}: name its folder with --model")
    if not arguments.data.is_dir():
        raise UserError(f"there is no folder {arguments.data}: name the folder of the data with --data")
    check_device(arguments.device)
    with as_user_error(ValueError):
        check_how(arguments.compile or False)
