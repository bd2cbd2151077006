"""What a preset costs before it is run: tokens, operations, hours, memory; without a network and without weights.

Operations are 2 a parameter and token forward and 4 backward, of the parameters that every token is multiplied by: all
but embedding tables, unless the table is the output layer as well. Gradient checkpointing computes each forward pass
again (2 more), a teacher reads each token, too (2 more). A forward pass computes every expert in training, so sparsity
saves nothing here. Left out: attention's products of tokens with tokens, conversion, and the search for tau.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.presets.preset import ANALYSES, Model, Part, Preset, Run
from benchmarks.sources import SOURCES

TFLOPS = 180.0
"""What one card sustains unless it is said, in 10^12 operations a second: ``held`` trained SmolLM2-135M on an H100 at
225,596 tokens a second (benchmarks/results/training-h100.md), times 6 times its 134.5 million parameters. Larger models
come nearer to the card's peak."""
FORWARD, BACKWARD = 2, 4
BYTES_A_PARAMETER = 16
"""Weights, gradients and AdamW's two moments in float32."""
EVALUATION_WINDOWS, EVALUATION_TEXTS = 64, 2
"""Windows that the harness measures perplexity on, of the test text and of the training text's end."""
MMLU_TOKENS = 14_042 * 700
"""MMLU's test questions with five examples before each, about 700 tokens, read once for the four letters."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model.

    Attributes:
        parameters: all of them.
        multiplied: those that every token is multiplied by.
    """

    parameters: int
    multiplied: int


def sizes_of(model: Model) -> Sizes:
    """Count the parameters of a model from its published sizes; no weights are made."""
    import transformers

    config = getattr(transformers, model.config)(**model.sizes)
    with torch.device("meta"):
        made: Any = getattr(transformers, model.architecture)(config)
    parameters = sum(parameter.numel() for parameter in made.parameters())
    tables = [module.weight for module in made.modules() if isinstance(module, nn.Embedding)]
    head = made.get_output_embeddings()
    idle = sum(table.numel() for table in tables if head is None or table is not head.weight)
    return Sizes(parameters, parameters - idle)


@dataclass(frozen=True)
class Cost:
    """What one run costs.

    Attributes:
        run: which.
        steps: optimiser steps.
        trained: tokens that go forward and backward.
        read: tokens that go forward only.
        flops: operations of both.
    """

    run: Run
    steps: int
    trained: float
    read: float
    flops: float

    def hours(self, tflops: float) -> float:
        """Hours of one card that sustains so many 10^12 operations a second."""
        return self.flops / (tflops * 1e12 * 3600)


def cost_of(part: Part, run: Run, model: Model, sizes: Sizes) -> Cost:
    """What one run of a part costs."""
    steps = steps_of(part, run.task)
    trained = steps * part.batch * tokens_of(part, run.task)
    read = measured_tokens(part, run)
    passes = FORWARD + BACKWARD + FORWARD * (model.checkpointing + run.teacher)
    return Cost(run, steps, trained, read, sizes.multiplied * (passes * trained + FORWARD * read))


def steps_of(part: Part, task: str) -> int:
    """Optimiser steps of a run."""
    if part.steps is not None:
        return part.steps
    assert part.epochs is not None
    source = SOURCES[task]
    rows: float = source.rows["train"]
    if source.form == "text":  # windows of so many tokens, not lines
        rows = rows * (source.tokens or 0) / part.length
    return math.ceil(part.epochs * math.ceil(rows / part.batch))


def tokens_of(part: Part, task: str) -> float:
    """Mean tokens of a row as it is trained on; a window of running text is full."""
    source = SOURCES[task]
    return part.length if source.form == "text" or source.tokens is None else min(part.length, source.tokens)


def measured_tokens(part: Part, run: Run) -> float:
    """Tokens that the measurement of a run reads."""
    settings = max(1, len(run.sparsity))
    source, tokens = SOURCES[run.task], tokens_of(part, run.task)
    if part.kind == "glue":
        return settings * source.rows["dev"] * tokens
    if part.kind == "writing":  # the loss of one split; the other's texts are written, and read again to count
        return settings * tokens * (source.rows["valid"] + 2 * source.rows["test"])
    if part.kind == "instruct":
        return float(settings * MMLU_TOKENS)
    points = max(settings, len(part.taus)) if part.kind in ANALYSES else settings
    return float(points * EVALUATION_TEXTS * EVALUATION_WINDOWS * part.length)


def costs_of(preset: Preset) -> list[tuple[Part, Cost]]:
    """What every run of a preset costs, in the order in which they are done."""
    sizes = sizes_of(preset.model)
    return [(part, cost_of(part, run, preset.model, sizes)) for part in preset.parts for run in part.runs()]


def summary(costs: Sequence[tuple[Part, Cost]], preset: Preset, tflops: float) -> dict[str, Any]:
    """Sums over all runs, and what the hours assume; ready for JSON."""
    sizes = sizes_of(preset.model)
    found = [cost for _, cost in costs]
    return {
        "figure": preset.name,
        "title": preset.title,
        "model": preset.model.name,
        "parameters": sizes.parameters,
        "multiplied": sizes.multiplied,
        "runs": len(found),
        "trained_tokens": sum(cost.trained for cost in found),
        "read_tokens": sum(cost.read for cost in found),
        "flops": sum(cost.flops for cost in found),
        "tflops": tflops,
        "hours": sum(cost.hours(tflops) for cost in found),
        "memory_gb": BYTES_A_PARAMETER * sizes.parameters / 1e9,
    }
