"""Calibration data in every form that callers have it."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_llama import byte_tokenizer, tiny_llama

from torch_prunepath.inputs.data import as_inputs, can_sample, evaluating, iterate_inputs, row_length, sample_text

MODEL = tiny_llama()
IDS = torch.randint(1, 90, (6, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "calibration",
    [IDS, {"input_ids": IDS}, [IDS[:2], IDS[2:]], [{"input_ids": IDS}], list(IDS), (row for row in IDS), IDS.tolist()],
    ids=["tensor", "dict", "batches", "dicts", "rows", "generator", "lists"],
)
def test_forms_of_token_ids(calibration) -> None:  # type: ignore[no-untyped-def]
    inputs = as_inputs(calibration, MODEL)
    assert inputs.keys() == {"input_ids"} and torch.equal(inputs["input_ids"], IDS)


def test_rows_of_different_length_are_padded_and_masked() -> None:
    inputs = as_inputs([IDS[:2, :4], IDS[2:]], MODEL)
    mask = inputs["attention_mask"]
    assert inputs["input_ids"].shape == mask.shape == (6, 10)
    assert mask[:2].sum() == 8 and mask[2:].all()
    assert torch.equal(inputs["input_ids"][:2, :4], IDS[:2, :4])


def test_limit_keeps_rows_spread_over_the_data() -> None:
    kept = as_inputs(IDS, MODEL, tokens=30)["input_ids"]
    assert torch.equal(kept, IDS[[0, 2, 5]])
    assert as_inputs(IDS, MODEL, tokens=1)["input_ids"].shape == (1, 10)


def test_texts_are_cut_into_rows() -> None:
    tokenizer = byte_tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 20
    ids = tokenizer(text)["input_ids"]
    inputs = as_inputs([text, "short and sweet"], MODEL, tokenizer)
    length = row_length(MODEL)
    assert inputs["input_ids"].shape[1] == length
    real = inputs["input_ids"][inputs["attention_mask"].bool()].tolist()
    assert real == ids + tokenizer("short and sweet")["input_ids"]


def test_other_model_inputs_are_joined() -> None:
    model, inputs = ARCHITECTURES["vit"]()
    pixels = inputs["pixel_values"]
    joined = as_inputs([{"pixel_values": pixels}, {"pixel_values": pixels}], model)
    assert joined["pixel_values"].shape[0] == 2 * pixels.shape[0]


def test_sequence_to_sequence_models_get_decoder_inputs() -> None:
    model, _ = ARCHITECTURES["t5_gated"]()
    assert torch.equal(as_inputs(IDS, model)["decoder_input_ids"], IDS)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "calibration is empty"),
        (["text"], ValueError, "pass tokenizer="),
        (["text", IDS], ValueError, "mixes texts"),
        (3.5, TypeError, "calibration must hold"),
        ([IDS.float()], TypeError, "calibration must hold .* torch.float32"),
        (IDS[None], TypeError, "calibration must hold"),
        ([{"input_ids": IDS}, {"x": IDS}], ValueError, "different keys"),
        ([{"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 4)}], ValueError, "differ in the shape of 'x'"),
    ],
)
def test_wrong_data(calibration, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        as_inputs(calibration, MODEL)


def test_empty_texts() -> None:
    with pytest.raises(ValueError, match="empty after tokenisation"):
        as_inputs([""], MODEL, byte_tokenizer())


def test_evaluation_batches_stay_apart() -> None:
    batches = iterate_inputs([IDS[:2, :4], IDS[2:]], MODEL)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (4, 10)]
    assert sum(b["input_ids"].shape[0] for b in iterate_inputs(["word " * 400], MODEL, byte_tokenizer())) > 8


def test_sampling_is_seeded_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    a, b, c = (sample_text(MODEL, 200, seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())
    assert a.numel() >= 126 and a.unique().numel() > 20


@pytest.mark.parametrize("name", ["bert", "t5_gated", "vit", "whisper"])
def test_only_causal_language_models_sample(name: str) -> None:
    model, _ = ARCHITECTURES[name]()
    assert not can_sample(model)
    with pytest.raises(ValueError, match="pass calibration="):
        sample_text(model, 10)


def test_evaluating_restores_modes_even_after_an_error() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert modes == [m.training for m in model.modules()] and torch.is_grad_enabled()
