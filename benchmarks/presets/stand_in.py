"""Small stand-ins for a preset: a random model of the same architecture, a tokenizer of bytes, made-up data.

They show that the code of an experiment runs from one end to the other, and nothing else.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.presets.preset import ANALYSES, Part, Preset
from benchmarks.sources import SOURCES, Row, Source, write

CONTEXT = 256
"""Positions of the models: one more than RoBERTa's padding index is what it needs besides."""
WIDTH, FFN, LAYERS, HEADS = 32, 64, 2, 2
EXPERT_SIZE = 8
"""Neurons an expert: eight experts a layer."""
STEPS = 2
LENGTH = 64
ROWS: Mapping[str, int] = MappingProxyType({"train": 48, "dev": 16, "valid": 8, "test": 6})
TEXT_LINES = 160
SPECIAL = ("<pad>", "<eos>")
SPREAD = 0.2
"""Standard deviation of the random weights: far from zero, so that experts differ."""
WORDS = ("red", "blue", "stone", "river", "cloud", "paper", "tree", "house")
SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT + 2,
        "n_embd": WIDTH,
        "n_inner": FFN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": CONTEXT,
        "type_vocab_size": 1,
    }
)
"""What sizes become, by the names that the architectures' configurations have for them."""


def shrunk(preset: Preset) -> Preset:
    """The same experiments with a few steps, one seed, one learning rate, few rows and small experts."""
    return dataclasses.replace(preset, parts=tuple(_small(part) for part in preset.parts), autocast=False)


def _small(part: Part) -> Part:
    small = {"expert_size": EXPERT_SIZE}
    methods = {name: {**fields, **(small if _has_experts(name) else {})} for name, fields in part.methods.items()}
    options = {**part.options, **({"expert_size": EXPERT_SIZE} if "expert_size" in part.options else {})}
    if "accumulation" in options:
        options["accumulation"] = 2
    few: dict[str, Any] = {"steps": STEPS, "epochs": None, "batch": 4, "length": LENGTH, "new_tokens": 4}
    shares = (0.3, 0.6) if part.kind in ANALYSES else (0.5,)
    same = {"lr": part.lr[:1], "dense_lr": part.dense_lr[:1], "seeds": part.seeds[:1], "sources": part.sources[:2]}
    return dataclasses.replace(part, methods=methods, options=options, sparsity=shares, **same, **few)


def _has_experts(method: str) -> bool:
    from benchmarks.harness.methods import METHODS

    return "expert_size" in METHODS[method].fields


def tokenizer(encoder: bool) -> PreTrainedTokenizerFast:
    """One token a byte; an encoder's rows end with the end of sequence, between pairs as well."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate((*SPECIAL, *alphabet))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if encoder:
        end = (SPECIAL[1], vocabulary[SPECIAL[1]])
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {end[0]}", pair=f"$A {end[0]} $B {end[0]}", special_tokens=[end]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=SPECIAL[0], eos_token=SPECIAL[1])


def save_model(preset: Preset, folder: Path) -> Path:
    """A random model of the preset's architecture with its tokenizer, in a folder that ``from_pretrained`` takes."""
    import transformers

    model = preset.model
    encoder = model.architecture.endswith("SequenceClassification")
    words = tokenizer(encoder)
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": SPREAD}
    # An untied head stays untied, since it is another path through the code.
    sizes = {name: SMALL.get(name, value) for name, value in model.sizes.items()} | {"vocab_size": len(words)}
    if "n_embd" in sizes:
        sizes["n_inner"] = FFN
    config = getattr(transformers, model.config)(**sizes, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, model.architecture)(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# --- data -------------------------------------------------------------------------------------------------------------


def save_data(preset: Preset, folder: Path) -> Path:
    """Made-up rows for every split that the preset reads, and MMLU's where it is judged by that."""
    draw = random.Random(0)
    for part in preset.parts:
        for name in part.sources:
            for split in part.splits:
                write(SOURCES[name], split, made_up(SOURCES[name], split, draw), folder)
        if part.kind == "instruct":
            for split, number in (("dev", 5), ("test", 4)):
                write(MMLU, split, [_question(draw) for _ in range(number)], folder)
    return folder


MMLU = Source("mmlu", "cais/mmlu", {"dev": "dev", "test": "test"}, ("question", "choices", "answer"), config="all")
"""MMLU's questions as a folder holds them; without a folder lm-eval fetches its own."""


def made_up(source: Source, split: str, draw: random.Random) -> list[Row]:
    """Rows with the columns of a source."""
    number = TEXT_LINES if source.form == "text" else ROWS[split]
    return [{column: _made(column, row, draw) for column in source.columns} for row in range(number)]


def _made(column: str, row: int, draw: random.Random) -> Any:
    by_name: Mapping[str, Callable[[], Any]] = {
        "label": lambda: row % 2,
        "messages": lambda: [_said("user", draw), _said("assistant", draw)],
        "text": lambda: f" {_words(draw, 6)} . \n",
        "meaning_representation": lambda: f"name : {_words(draw, 1)} {row // 2}",
    }
    return by_name.get(column, lambda: _words(draw, 3))()


def _said(role: str, draw: random.Random) -> dict[str, str]:
    return {"role": role, "content": _words(draw, 2)}


def _question(draw: random.Random) -> Row:
    return {"question": _words(draw, 2), "choices": [_words(draw, 1) for _ in range(4)], "answer": draw.randrange(4)}


def _words(draw: random.Random, number: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(number))
