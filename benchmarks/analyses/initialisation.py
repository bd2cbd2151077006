"""What the first experts and routers are worth, after conversion and after training: figure 7 of arXiv 2605.28283.

    python -m benchmarks initialisation run --model DIR_OR_GGUF --data FOLDER --steps 300 --seeds 0 1 2 -o OUT
    python -m benchmarks initialisation report OUT

Models are converted and trained as ``benchmarks books`` does it, on the same texts; without ``--steps`` nothing is
trained. Each part writes one JSON file once it is done, and is not done again. ``results.json``, ``results.md`` and
``results.png`` in the folder are those of the last command; ``OUT/cache`` can be removed when all is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from benchmarks.analyses import variants
from benchmarks.analyses.study import Part, Study, add_options, product
from benchmarks.harness.jobs import check_positive
from torch_prunepath.config import Partition, RouterInit

NAME = "initialisation"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the analysis takes."""
    add_options(command, sparsity=[0.3, 0.5, 0.7])
    partitions, routers = get_args(Partition), get_args(RouterInit)
    add = command.add_argument
    add("--partitions", nargs="+", default=list(partitions), choices=partitions, metavar="PARTITION")
    add("--routers", nargs="+", default=["fitted"], choices=routers, metavar="ROUTER", help=", ".join(routers))
    add("--expert-size", type=int, default=8, help="neurons an expert (default: 8)")


def plan(study: Study) -> list[Part]:
    """A model for each partition, router and seed."""
    arguments = study.arguments
    chosen = {
        f"{partition}, {router}": {"partition": partition, "router": router}
        for partition, router in product(arguments.partitions, arguments.routers)
    }
    return variants.parts_of(study, chosen, {"expert_size": arguments.expert_size})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""

    def check(arguments: argparse.Namespace) -> None:
        check_positive({"expert_size": arguments.expert_size})

    title = "Perplexity by partition and router initialisation"
    return variants.analysis(NAME, __doc__, title, add_arguments, check, plan).main(argv)
