"""Settings that several figures share, each with its source.

What is known of the paper's settings comes from its text as far as it is known to us, from the authors' released code
and from the baselines' papers. All else is this library's, and says so.
"""

from __future__ import annotations

from benchmarks.presets.preset import BASELINE, OURS, RELEASED, Given, Model

# Published sizes: the configuration files of the models on the hub.
ROBERTA_LARGE = Model(
    "FacebookAI/roberta-large",
    "RobertaConfig",
    "RobertaForSequenceClassification",
    {
        "vocab_size": 50265,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
)
GPT2_MEDIUM = Model(
    "openai-community/gpt2-medium",
    "GPT2Config",
    "GPT2LMHeadModel",
    {"vocab_size": 50257, "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16},
)
QWEN2_7B = Model(
    "Qwen/Qwen2-7B",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    checkpointing=True,  # without it activations do not fit beside 122 GB of weights, gradients and AdamW's moments
)

LR = 1e-4
"""Released code: of the model's weights. Every method gets it, so that none is favoured."""
LTE_LR = 5e-5
"""LTE's paper: for GPT-2 Medium. A second rate of the grid, from which the selection half chooses."""
TAU = 0.95
"""Released code: of the second stage; 0.5 is the other value that it has."""
QWEN_TAU = 0.94
"""Paper: Qwen2-7B trained at this threshold."""
EPOCHS = 2.0
"""Released code: two stages of one epoch each; every method gets as many."""

RELEASED_RECIPE = (
    Given("experts", "32 neurons, balanced k-means on L2-normalised gate rows", RELEASED),
    Given("router", "linear, no bias, zero at first", RELEASED),
    Given("losses", "task + 3e-4 entropy + 1e-3 load balance", RELEASED),
    Given("stages", "all experts, then tau; one epoch each", RELEASED, "epochs=2 in all, for every method"),
    Given("learning rates", "1e-4, routers 1e-3; weight decay 1e-2", RELEASED, "method prunepath"),
)
LTE_RECIPE = Given("LTE", "lr 5e-5, warm-up 0.06, batch 8 to 128", BASELINE, "arXiv 2402.06126; the rate for GPT-2")
MOEFICATION_RECIPE = Given(
    "MoEfication", "fixed top-k, MLP router", BASELINE, "ACL 2022 findings; about 20% active there"
)
UNKNOWN = (
    Given("warm-up and decay", "5%, cosine", OURS, "this library's defaults"),
    Given("batch, length, seeds", "see the parts", OURS),
    Given("sparsities", "see the parts", OURS, "the figure's axis; where its points lie is not known to us"),
    Given("method held", "recipes.held", OURS, "lr from the same grid as every method's"),
)
