"""What each choice of the recipe is worth: gate, selection rule, budget, router input, losses, changed one by one.

    python -m benchmarks ablations run --model DIR_OR_GGUF --data FOLDER --steps 300 -o OUT
    python -m benchmarks ablations report OUT

Models are converted and trained as ``benchmarks books`` does it, on the same texts; without ``--steps`` nothing is
trained. Each part writes one JSON file once it is done, and is not done again. ``results.json``, ``results.md`` and
``results.png`` in the folder are those of the last command; ``OUT/cache`` can be removed when all is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from benchmarks.analyses import variants
from benchmarks.analyses.study import Part, Study, add_options
from benchmarks.harness.options import value_of
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


def plan(study: Study) -> list[Part]:
    """A model for each variant and seed."""
    arguments = study.arguments
    chosen = {name: VARIANTS[name] for name in dict.fromkeys(arguments.variants)}
    chosen |= dict(parse(text) for text in arguments.variant)
    return variants.parts_of(study, chosen, {})


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""

    def check(arguments: argparse.Namespace) -> None:
        for text in arguments.variant:
            parse(text)

    return variants.analysis(NAME, __doc__, "Perplexity by choice of the recipe", add_arguments, check, plan).main(argv)
