"""Figure 5: MMLU of Qwen2-7B, instruction-tuned on Tulu-v2 and made sparse (PrunePath at tau 0.94)."""

from __future__ import annotations

import functools

from benchmarks.presets.command import main_of
from benchmarks.presets.preset import BASELINE, OURS, PAPER, Given, Part, Preset
from benchmarks.presets.settings import LR, QWEN2_7B, QWEN_TAU, RELEASED_RECIPE, UNKNOWN

PRESET = Preset(
    "figure5",
    "MMLU (5-shot) against sparsity, Qwen2-7B tuned on Tulu-v2",
    QWEN2_7B,
    (
        Part(
            "instruct",
            ("tulu2",),
            {"dense": {}, "prunepath": {"tau": QWEN_TAU}, "held": {}, "lte-held": {}, "static-wanda": {}},
            (0.3, 0.5),
            lr=(1e-5,),
            epochs=2.0,
            batch=64,
            length=2048,
            options={"accumulation": 64},
        ),
    ),
    (
        Given("model", "Qwen2-7B", PAPER),
        Given("data", "Tulu-v2 mixture", PAPER),
        Given("judge", "MMLU", PAPER, "5-shot, by lm-eval: ours"),
        Given("tau", str(QWEN_TAU), PAPER),
        Given("learning rate", "1e-5", OURS, f"the released code's {LR:g} is for models of 0.4 billion parameters"),
        Given("epochs", "2", BASELINE, "Tulu 2 (arXiv 2311.10702) tunes for two epochs; so do two stages of one each"),
        Given("length", "2048 tokens", OURS),
        *RELEASED_RECIPE,
        *UNKNOWN,
    ),
)
main = functools.partial(main_of, PRESET)
