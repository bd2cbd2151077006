"""What each choice of the recipe is worth: gate, selection rule, budget, router input, losses, changed one by one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.analyses import variants
from benchmarks.analyses.study import Study, add_options
from benchmarks.common.options import value_of
from torch_prunepath.console.errors import UserError

NAME = "ablations"
OPEN = 8.0
"""Inside the sigmoid gate: fitted routers score their experts by log-probabilities, and start near gate 1 with it."""
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ours": {},
        "gate-sigmoid": {"gate": "sigmoid"},
        "gate-sigmoid-open": {"gate": "sigmoid", "gate_offset": OPEN},
        "rule-below": {"rule": "below"},
        "gate-sigmoid-open-rule-below": {"gate": "sigmoid", "gate_offset": OPEN, "rule": "below"},
        "budget-uniform": {"budget": "uniform"},
        "router-norm": {"router_norm": True},
        "no-shared": {"shared_experts": 0},
        "fit-into-trunk": {"fit_detached": False},
        "fit-and-entropy": {"entropy": 3e-4},
        "fit-and-load-balance": {"load_balance": 1e-3},
        "distil": {"distill_logits": 1.0},
    }
)
"""Settings in which each differs from the recipe."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the analysis takes."""
    add_options(command, sparsity=[0.3, 0.5, 0.7])
    add = command.add_argument
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    add("--variant", action="append", default=[], metavar="NAME:FIELD=VALUE[;FIELD=VALUE...]", help="one more")


def work(arguments: argparse.Namespace, command_line: str) -> tuple[str, str]:
    """Measure what is not measured yet; the table and the results as text."""
    chosen = {name: VARIANTS[name] for name in dict.fromkeys(arguments.variants)}
    chosen |= dict(parse(text) for text in arguments.variant)
    study = Study(NAME, arguments, command_line)
    return variants.finish(study, study.do(variants.parts_of(study, chosen, {})), "Perplexity by choice of the recipe")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME:FIELD=VALUE;FIELD=VALUE`` as name and settings.

    Raises:
        UserError: if it is written otherwise.
    """
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(";")]
    if not colon or not name or not all(field and equals for field, equals, _ in pairs):
        raise UserError(f"--variant {text} is not understood: write --variant 'NAME:FIELD=VALUE;FIELD=VALUE'")
    return name, {field.strip().replace("-", "_"): value_of(value) for field, _, value in pairs}
