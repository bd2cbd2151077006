"""What the first experts and routers are worth, after conversion and after training: figure 7 of arXiv 2605.28283."""

from __future__ import annotations

import argparse
from typing import get_args

from benchmarks.analyses import variants
from benchmarks.analyses.study import Study, add_options, product
from benchmarks.common.options import check_positive
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


def work(arguments: argparse.Namespace, command_line: str) -> tuple[str, str]:
    """Measure what is not measured yet; the table and the results as text."""
    check_positive({"expert_size": arguments.expert_size})
    study = Study(NAME, arguments, command_line)
    chosen = {
        f"{partition}, {router}": {"partition": partition, "router": router}
        for partition, router in product(arguments.partitions, arguments.routers)
    }
    parts = study.do(variants.parts_of(study, chosen, {"expert_size": arguments.expert_size}))
    return variants.finish(study, parts, "Perplexity by partition and router initialisation")
