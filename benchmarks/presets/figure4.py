"""Figure 4: GPT-2 Medium on E2E NLG, XSum and WikiText-103 against sparsity, PrunePath and the baselines."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.preset import OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import (
    EPOCHS,
    GPT2_MEDIUM,
    LR,
    LTE_LR,
    LTE_RECIPE,
    MOEFICATION_RECIPE,
    RELEASED_RECIPE,
    UNKNOWN,
)

METHODS = {
    "dense": {},
    "prunepath": {"tau": 0.5},
    "held": {},
    "lte-held": {},
    "moefication-mlp": {},
    "static-wanda": {},
}
SPARSITY = (0.5, 0.7, 0.8, 0.9)
_TUNED = {name: fields for name, fields in METHODS.items() if name != "dense"}
PRESET = Preset(
    "figure4",
    "BLEU and ROUGE-L on E2E and XSum, perplexity on WikiText-103, against sparsity, GPT-2 Medium",
    GPT2_MEDIUM,
    (
        Part("writing", ("e2e",), _TUNED, SPARSITY, (LR,), (LTE_LR,), epochs=EPOCHS, batch=32, length=160),
        Part(
            "writing",
            ("xsum",),
            _TUNED,
            SPARSITY,
            (LR,),
            (LTE_LR,),
            epochs=EPOCHS,
            batch=16,
            length=768,
            new_tokens=64,
        ),
        Part("books", ("wikitext103",), METHODS, SPARSITY, (LR,), epochs=EPOCHS, batch=32, length=512),
    ),
    (
        Given("model", "GPT-2 Medium", PAPER),
        Given("tasks", "E2E NLG, XSum, WikiText", PAPER),
        Given("WikiText", "wikitext-103-raw-v1", OURS, "which of the two sizes is not known to us; LTE takes this one"),
        Given("methods", "LTE, MoEfication and static pruning beside PrunePath", PAPER, "abstract"),
        Given("prunepath, tau", "0.5", OURS, "the released code's other value than 0.95: these sparsities are high"),
        Given("prompts", "'MEANING\\n\\nDescription:', 'DOCUMENT\\n\\nSummary:'", OURS),
        Given("decoding", "greedy", OURS),
        *RELEASED_RECIPE,
        LTE_RECIPE,
        MOEFICATION_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
