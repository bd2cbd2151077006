"""Figure 8: perplexity and realised sparsity of one checkpoint over tau, GPT-2 Medium."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.preset import OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import EPOCHS, GPT2_MEDIUM, LR, RELEASED_RECIPE, UNKNOWN

STEPS = 14_400
"""Two passes over WikiText-103 (117.9 million tokens of GPT-2) in steps of 32 windows of 512."""
TAUS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
PRESET = Preset(
    "figure8",
    "perplexity and sparsity of one checkpoint over tau, GPT-2 Medium",
    GPT2_MEDIUM,
    (
        Part(
            "taus",
            ("wikitext103",),
            {"prunepath": {}, "ours": {}},
            (0.3, 0.9),
            lr=(LR,),
            steps=STEPS,
            batch=32,
            taus=TAUS,
        ),
    ),
    (
        Given("model", "GPT-2 Medium", PAPER),
        Given("axes", "perplexity and sparsity over tau, one checkpoint", PAPER),
        Given("prunepath, tau in training", "0.95", "released code"),
        Given("length", f"{STEPS:,} steps, {EPOCHS:g} epochs", "released code", "two stages of one epoch each"),
        Given("taus", ", ".join(f"{tau:g}" for tau in TAUS), OURS),
        Given("method ours", "recipes.ours", OURS, "one checkpoint for 30% to 90%"),
        *RELEASED_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
