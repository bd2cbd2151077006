"""Sparse models under ``generate`` and ``pipeline``: caches, beams, assistants, padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_llama import byte_tokenizer, tiny_llama
from torch import Tensor, nn
from transformers import pipeline

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparse_layers, sparsify

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
STEPS = 12


def sparse(dense: nn.Module | None = None, tau: float = 0.5) -> Any:
    """In float64, so that no token hangs on a rounding."""
    return sparsify((tiny_llama() if dense is None else dense).double(), tau, config=CONFIG, progress=False)


def prompt(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    found: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return found


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_caches_and_beams_write_what_is_written_without_a_cache(name: str, cache: str, beams: int) -> None:
    model = sparse(ARCHITECTURES[name]()[0], 0.3)
    with record_sparsity(model) as record:
        expected = generate(model, prompt(), num_beams=beams, use_cache=False)
    assert record.sparsity > 0.3
    assert torch.equal(generate(model, prompt(), num_beams=beams, cache_implementation=cache), expected)


def test_tau_1_writes_what_the_dense_model_writes() -> None:
    expected = generate(tiny_llama().double(), prompt(), num_beams=3)
    assert torch.equal(generate(sparse(tau=1.0), prompt(), num_beams=3), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_left_padding_changes_nothing(name: str, cache: str) -> None:
    """Neither the text, nor what is counted."""
    model = sparse(ARCHITECTURES[name]()[0], 0.3)
    short, long = prompt(1, 4), prompt(1, 9)
    padded = torch.cat([nn.functional.pad(short, (5, 0)), long])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    with record_sparsity(model) as alone:
        rows = [generate(model, ids)[:, -STEPS:] for ids in (short, long)]
    with record_sparsity(model) as together:
        found = generate(model, padded, mask, cache_implementation=cache)[:, -STEPS:]
    assert torch.equal(found, torch.cat(rows))
    assert together.tokens == alone.tokens == 4 + 9 + 2 * (STEPS - 1)
    assert together.per_layer == pytest.approx(alone.per_layer)


def count_calls(model: nn.Module) -> list[int]:
    """How many tokens each call of a model takes, as they come."""
    calls: list[int] = []
    next(iter(sparse_layers(model).values())).register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    return calls


def test_a_dense_assistant_drafts_for_a_sparse_model() -> None:
    model, ids = sparse(tau=0.9), prompt(1)
    expected = generate(model, ids)
    calls = count_calls(model)
    assert torch.equal(generate(model, ids, assistant_model=tiny_llama().double()), expected)
    assert max(calls[1:]) > 1, "it checks several drafted tokens at once"


def test_a_model_drafts_for_itself_at_a_smaller_tau() -> None:
    """The draft is a copy that shares every weight."""
    model, ids = sparse(tau=0.9), prompt(1)
    expected = generate(model, ids)
    draft = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    set_tau(draft, 0.6)
    assert all(mine is its for mine, its in zip(model.parameters(), draft.parameters(), strict=True))
    assert all(float(layer.tau) == pytest.approx(0.9) for layer in sparse_layers(model).values())
    calls, drafted = count_calls(model), count_calls(draft)
    assert torch.equal(generate(model, ids, assistant_model=draft), expected)
    assert drafted and max(calls[1:]) > 1


def test_prompt_lookup() -> None:
    model, ids = sparse(), prompt(1).repeat(1, 3)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


def test_pipeline_loads_and_writes(tmp_path: Path) -> None:
    model, tokenizer = sparse(), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["To be", "or not to be, that"]
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    written = generate(model, inputs["input_ids"], inputs["attention_mask"])[:, -STEPS:]
    writer = pipeline("text-generation", model=str(tmp_path), dtype=torch.float64)
    assert len(sparse_layers(writer.model)) == 2
    found = writer(texts, batch_size=2, return_full_text=False, **settings)
    assert [row[0]["generated_text"] for row in found] == tokenizer.batch_decode(written)
    assert pipeline("text-generation", model=model, tokenizer=tokenizer)(texts[0], **settings)[0]["generated_text"]
