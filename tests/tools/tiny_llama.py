"""A random Llama of a few thousand weights with a byte tokenizer, saved as a folder that from_pretrained takes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 128


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{byte: i for i, byte in enumerate(alphabet, 1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_llama(seed: int = 0, num_hidden_layers: int = 2, num_key_value_heads: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,  # far from zero, so that experts differ
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_llama(folder: Path, num_hidden_layers: int = 2) -> Path:
    tiny_llama(num_hidden_layers=num_hidden_layers).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_texts(folder: Path) -> None:
    """``train.txt`` and ``test.txt``: sentences that a tiny model can learn."""
    words = ("cat", "dog", "cow")
    lines = [
        f"The {word} number {i} sat on the {words[i % 3]} mat, and said so.\n" for i in range(150) for word in words
    ]
    (folder / "train.txt").write_text("".join(lines[:400]))
    (folder / "test.txt").write_text("".join(lines[400:]))
