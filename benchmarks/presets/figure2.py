"""Figure 2: error of an FFN's output against the number of active experts, by what ranks them."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.preset import OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import GPT2_MEDIUM, LR, RELEASED_RECIPE, UNKNOWN

ANALYSIS_STEPS = 3_000
"""Of training each model of an analysis: 49 million tokens, a fifth of two passes over WikiText-103."""
METHODS = ("ours", "lte", "moefication-mlp", "moefication-centroid")
PRESET = Preset(
    "figure2",
    "reconstruction error against active experts, GPT-2 Medium",
    GPT2_MEDIUM,
    (
        Part(
            "reconstruction",
            ("wikitext103",),
            {name: {} for name in METHODS},
            (0.8,),
            lr=(LR,),
            steps=ANALYSIS_STEPS,
            batch=32,
            options={"expert_size": 32, "active": (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)},
        ),
    ),
    (
        Given("axes", "relative error of a layer's output, share of active experts", PAPER),
        Given("model and text", "GPT-2 Medium, WikiText-103", OURS, "the figure's own model is not known to us"),
        Given("method ours", "recipes.ours, experts of 32", OURS, "in place of the released code's routers"),
        Given("steps", f"{ANALYSIS_STEPS:,}", OURS),
        *RELEASED_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
