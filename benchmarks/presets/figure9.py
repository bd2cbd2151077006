"""Figure 9: what each choice of the recipe is worth, changed one by one."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.figure2 import ANALYSIS_STEPS
from benchmarks.presets.preset import OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import GPT2_MEDIUM, LR, RELEASED_RECIPE, UNKNOWN

VARIANTS = (
    "ours",
    "gate-sigmoid",
    "gate-sigmoid-open",
    "rule-below",
    "budget-uniform",
    "router-norm",
    "fit-and-entropy",
    "fit-and-load-balance",
)
PRESET = Preset(
    "figure9",
    "perplexity by choice of the recipe, GPT-2 Medium",
    GPT2_MEDIUM,
    (
        Part(
            "ablations",
            ("wikitext103",),
            {},
            (0.3, 0.5, 0.7),
            lr=(LR,),
            steps=ANALYSIS_STEPS,
            batch=32,
            variants=VARIANTS,
            options={"variants": VARIANTS},
        ),
    ),
    (
        Given("what is compared", "parts of the method, one by one", PAPER, "which ones is not known to us"),
        Given("which", ", ".join(VARIANTS), OURS, "the choices in which recipe and paper differ"),
        Given("model and text", "GPT-2 Medium, WikiText-103", OURS, "the figure's own model is not known to us"),
        *RELEASED_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
