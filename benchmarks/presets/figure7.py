"""Figure 7: perplexity by how the first experts are made, after conversion and after training."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.figure2 import ANALYSIS_STEPS
from benchmarks.presets.preset import OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import GPT2_MEDIUM, LR, RELEASED_RECIPE, UNKNOWN

PARTITIONS = ("kmeans", "coactivation", "contiguous", "random")
PRESET = Preset(
    "figure7",
    "perplexity by the initialisation of experts, GPT-2 Medium",
    GPT2_MEDIUM,
    (
        Part(
            "initialisation",
            ("wikitext103",),
            {},
            (0.3, 0.5, 0.7),
            lr=(LR,),
            seeds=(0, 1, 2),
            steps=ANALYSIS_STEPS,
            batch=32,
            variants=PARTITIONS,
            options={"expert_size": 32, "partitions": PARTITIONS},
        ),
    ),
    (
        Given("what is compared", "initialisations of experts", PAPER),
        Given("which", ", ".join(PARTITIONS), OURS, "k-means is the released code's; the others are this library's"),
        Given("model and text", "GPT-2 Medium, WikiText-103", OURS, "the figure's own model is not known to us"),
        *RELEASED_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
