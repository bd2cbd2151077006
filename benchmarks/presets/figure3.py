"""Figure 3: GLUE accuracy against sparsity, RoBERTa-large, PrunePath and the baselines."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.preset import BASELINE, OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import (
    EPOCHS,
    LR,
    LTE_LR,
    LTE_RECIPE,
    MOEFICATION_RECIPE,
    RELEASED_RECIPE,
    ROBERTA_LARGE,
    UNKNOWN,
)

TASKS = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte")
PRESET = Preset(
    "figure3",
    "GLUE accuracy against sparsity, RoBERTa-large",
    ROBERTA_LARGE,
    (
        Part(
            "glue",
            TASKS,
            {
                "dense-longer": {},
                "prunepath": {"tau": 0.5},
                "held": {},
                "lte-held": {},
                "moefication-mlp": {},
                "static-wanda": {},
            },
            (0.5, 0.7, 0.8, 0.9),
            lr=(LR, LTE_LR),
            dense_lr=(LTE_LR,),
            seeds=(0, 1, 2),
            epochs=EPOCHS,
            batch=32,
            length=128,
        ),
    ),
    (
        Given("model", "RoBERTa-large", PAPER),
        Given(
            "tasks",
            ", ".join(TASKS),
            BASELINE,
            "LTE's GLUE tasks but STS-B, which is a regression; which of them the paper shows is not known to us",
        ),
        Given("methods", "LTE, MoEfication and static pruning beside PrunePath", PAPER, "abstract"),
        Given("static pruning", "Wanda's score, whole neurons", OURS, "which score the paper takes is not known to us"),
        Given("prunepath, tau", "0.5", OURS, "the released code's other value than 0.95: these sparsities are high"),
        Given("dense-longer", "the control: the steps without sparsity", OURS),
        *RELEASED_RECIPE,
        LTE_RECIPE,
        MOEFICATION_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
