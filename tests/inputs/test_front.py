"""What tokenizers put in front of a text starts every row and window, and counts nowhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import byte_tokenizer, tiny_llama
from tokenizers.processors import TemplateProcessing

from torch_prunepath import SparsifyConfig, record_sparsity, register_routing_hook, set_sparsity, sparsify
from torch_prunepath.console.errors import UserError
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.corpus import load_corpus, windows
from torch_prunepath.evaluation.perplexity import perplexity
from torch_prunepath.experts.budget import _output_gradients, fisher_information
from torch_prunepath.inputs.data import as_inputs, is_causal, iterate_inputs, sample_text, sampled_inputs
from torch_prunepath.inputs.front import FRONT, Added, added_tokens, as_batch, front_of, in_windows
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.train import TrainConfig, train
from torch_prunepath.train.batches import IGNORED, Batches, with_labels

TEXT = "The quick brown fox jumps over the lazy dog. " * 30
CONTEXT = 20


def adding(front: int = 0, behind: int = 0) -> Any:
    """A tokenizer that puts tokens in front of a text, ids 0, 1, ..., and some behind, ids 10, 11, ..."""
    tokenizer = byte_tokenizer()
    before, after = [f"<{i}>" for i in range(front)], [f"<{10 + i}>" for i in range(behind)]
    special = [(name, int(name[1:-1])) for name in before + after]
    template = TemplateProcessing(single=[*before, "$A", *after], special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def plain(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize(("front", "behind"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2)])
def test_what_a_tokenizer_adds(front: int, behind: int) -> None:
    assert added_tokens(adding(front, behind)) == Added(tuple(range(front)), tuple(range(10, 10 + behind)))


def test_a_tokenizer_that_hides_what_it_adds() -> None:
    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 7] if add_special_tokens else [8]}

    with pytest.raises(ValueError, match=r"\[8\] of 'a' without special tokens and \[1, 7\] with them"):
        added_tokens(tokenizer)
    with pytest.raises(ValueError, match="finds no token"):
        added_tokens(lambda text, add_special_tokens=True: {"input_ids": [1] if add_special_tokens else []})


@given(st.integers(0, 60), st.integers(0, 3), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_windows_start_with_the_front_and_hold_the_text_once(tokens: int, front: int, context: int) -> None:
    ids_T = torch.arange(100, 100 + tokens)
    if context <= front:
        with pytest.raises(ValueError, match="no room for text"):
            in_windows(ids_T, range(front), context)
        return
    window_NC = in_windows(ids_T, range(front), context)
    assert window_NC.shape == (tokens // (context - front), context)
    assert (window_NC[:, :front] == torch.arange(front)).all()
    text = window_NC[:, front:].flatten()
    assert torch.equal(text, ids_T[: len(text)])


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("front", [0, 1, 2])
def test_windows_of_a_corpus(front: int, behind: int) -> None:
    found = windows(TEXT, adding(front, behind), context=CONTEXT, count=1000, part="text")
    body = CONTEXT - front
    assert torch.equal(found[:, :front], torch.arange(front).expand(len(found), -1))
    assert found[:, front:].flatten().tolist() == plain(TEXT)[: len(TEXT) // body * body]
    with pytest.raises(UserError, match=f"has 5 tokens, and at least {body} are needed"):
        windows("12345", adding(front, behind), context=CONTEXT, count=1, part="text")
    if front:
        with pytest.raises(UserError, match="no room for text"):
            windows(TEXT, adding(front), context=front, count=1, part="text")


@pytest.mark.parametrize(("front", "behind"), [(1, 0), (2, 1), (0, 1)])
def test_rows_of_text_for_a_causal_model(front: int, behind: int) -> None:
    inputs = as_inputs([TEXT, "short, but long enough"], tiny_llama(), adding(front, behind))
    assert inputs.get(FRONT, 0) == front
    mask = inputs["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][:, :front], torch.arange(front).expand(len(mask), -1))
    real = inputs["input_ids"][:, front:][mask[:, front:]].tolist()
    end = list(range(10, 10 + behind))
    assert real == plain(TEXT) + end + plain("short, but long enough") + end


def test_rows_of_text_for_a_model_that_reads_both_ways() -> None:
    model, _ = ARCHITECTURES["bert"]()
    assert not is_causal(model)
    inputs = as_inputs("ABCDEFG" * 300, model, adding(1, 1))
    assert FRONT not in inputs, "what the first token becomes depends on the text"
    lengths = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(1)
    assert len(lengths) > 1
    assert all(row[0] == 0 and row[length - 1] == 10 for row, length in zip(inputs["input_ids"], lengths, strict=True))


@pytest.mark.parametrize(("name", "causal"), [("llama", True), ("opt", True), ("bert", False), ("t5_gated", False)])
def test_which_models_read_forward(name: str, causal: bool) -> None:
    model, _ = ARCHITECTURES[name]()
    assert is_causal(model) is causal
    if name == "llama":
        assert is_causal(model.model)


def test_ids_of_the_user_are_taken_as_they_are() -> None:
    ids = torch.randint(1, 90, (2, 10))
    assert as_inputs(ids, tiny_llama(), adding(2)).keys() == {"input_ids"}


@pytest.mark.parametrize("start", ["model", "tokenizer"])
def test_sampled_text_starts_as_texts_do(start: str) -> None:
    model, tokenizer = tiny_llama(), None if start == "model" else adding(2)
    ids = sample_text(model, 200, progress=False, tokenizer=tokenizer)
    front = [model.config.bos_token_id] if tokenizer is None else [0, 1]
    assert torch.equal(ids[:, : len(front)], torch.tensor(front).expand(len(ids), -1))
    inputs = sampled_inputs(model, 200, progress=False, tokenizer=tokenizer)
    assert inputs[FRONT] == len(front) and torch.equal(inputs["input_ids"], ids)


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window_NC() -> torch.Tensor:
    return windows(TEXT, adding(2), context=CONTEXT, count=4, part="text")


@pytest.mark.parametrize("front", [0, 1, 2])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_records_count_what_is_behind(window_NC: torch.Tensor, front: int, padding: str | None) -> None:
    model = sparsify(tiny_llama(), 0.6, calibration=window_NC, progress=False)
    mask = torch.ones_like(window_NC)
    counted = torch.ones(window_NC.shape, dtype=torch.bool)
    counted[:, :front] = False
    if padding == "left":
        mask[0, :5] = 0
        counted[0] = torch.arange(CONTEXT) >= 5 + front
    elif padding == "right":
        mask[0, -5:] = counted[0, -5:] = 0
    inputs = {"input_ids": window_NC} if padding is None else {"input_ids": window_NC, "attention_mask": mask}
    shares = []

    def note(routing: Any) -> None:
        shares.append(1 - routing.mask_TE.float()[counted.flatten()].mean())

    with register_routing_hook(model, note), record_sparsity(model, front_tokens=front) as record:
        plain_logits = model(**inputs).logits
    assert record.tokens == counted.sum()
    assert record.sparsity == pytest.approx(float(sum(shares) / len(shares)), abs=1e-6)
    assert torch.equal(plain_logits, model(**inputs).logits), "the model sees every token"


def test_a_search_leaves_the_front_out(window_NC: torch.Tensor) -> None:
    model = sparsify(tiny_llama(), 0.6, calibration=window_NC, progress=False)
    for data, extra in ((as_batch(window_NC, 2), {}), ([TEXT], {"tokenizer": adding(2)})):
        batches = iterate_inputs(data, model, **extra)
        assert front_of(batches) == 2
        set_sparsity(model, 0.3, data, progress=False, tolerance=0.002, **extra)
        with record_sparsity(model, front_tokens=2) as record:
            for batch in batches:
                model(**{key: value for key, value in batch.items() if key != FRONT})
        assert record.sparsity == pytest.approx(0.3, abs=0.01)


def test_calibration_visits_what_is_behind(window_NC: torch.Tensor) -> None:
    model = tiny_llama()
    views = [FFNView(model, spec) for spec in find_ffns(model)]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for front in (0, 2):
        inputs = as_inputs(as_batch(window_NC, front), model)
        visit_inputs(model, views, inputs, lambda view, x: seen.__setitem__((view.site, front), x))  # noqa: B023
        for site, g_ND in _output_gradients(model, views, inputs, torch.Generator().manual_seed(0)):
            seen[f"gradient of {site}", front] = g_ND
    for name, front in list(seen):
        if front:
            whole = seen[name, 0].view(len(window_NC), CONTEXT, -1)[:, front:].flatten(0, 1)
            torch.testing.assert_close(seen[name, front], whole)
    fisher_information(model, views, as_inputs(as_batch(window_NC, 2), model), progress=False)


def test_conversion_does_not_depend_on_what_is_in_front() -> None:
    """Layers below attention see nothing of the tokens in front, so nothing of them may be left in the first router."""
    routers = []
    for first in (0, 5):
        ids = windows(TEXT, adding(1), context=CONTEXT, count=8, part="text")
        ids[:, 0] = first
        model = tiny_llama()
        for layer in model.model.layers:  # attention adds nothing: each token sees itself alone
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        sparsify(model, 0.6, config=SparsifyConfig(expert_size=8), calibration=as_batch(ids, 1), progress=False)
        routers.append(model.model.layers[0].mlp.router.weight.detach().clone())
    torch.testing.assert_close(*routers)


# --- perplexity and training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [0, 1, 2, 3])
def test_perplexity_predicts_the_text_alone(front: int) -> None:
    model, ids = tiny_llama(), torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.log_softmax(-1)
    first = max(1, front)
    found = [log_p[n, t - 1, ids[n, t]] for n in range(3) for t in range(first, 9)]
    expected = math.exp(-float(sum(found)) / len(found))
    assert perplexity(model, ids, front_tokens=front) == pytest.approx(expected, rel=1e-5)


def test_windows_without_text_have_no_perplexity() -> None:
    with pytest.raises(ValueError, match="windows of 2 tokens have none to predict: make them longer than 2"):
        perplexity(tiny_llama(), torch.ones(3, 2, dtype=torch.long), front_tokens=2)


@pytest.mark.parametrize("front", [0, 1, 2])
def test_training_never_predicts_what_is_in_front(window_NC: torch.Tensor, front: int) -> None:
    (batch,) = Batches(window_NC, len(window_NC), seed=0, front=front)
    labels = with_labels(batch, causal=True)["labels"]
    assert (labels[:, :front] == IGNORED).all() and torch.equal(labels[:, front:], batch["input_ids"][:, front:])
    assert batch.get(FRONT, 0) == front


def test_realised_sparsity_in_training_leaves_the_front_out(window_NC: torch.Tensor) -> None:
    found = {}
    for front in (0, 2):
        model = sparsify(tiny_llama(), 0.6, calibration=window_NC, progress=False)
        (record,) = train(model, Batches(window_NC, 4, 0, front), TrainConfig(steps=1, lr=1e-9), progress=False)
        with record_sparsity(model, front_tokens=front) as expected:
            model(input_ids=window_NC)
        assert record["sparsity"] == pytest.approx(expected.sparsity, abs=1e-5)
        found[front] = record["sparsity"]
    assert found[0] != found[2]


def test_a_byte_order_mark_is_no_token(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    corpus = load_corpus(path)
    assert corpus.calibration + corpus.held_out == TEXT


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("calibrated", [True, False])
def test_weights_that_are_not_finite(value: float, calibrated: bool, window_NC: torch.Tensor) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ValueError, match=r"weights hold NaN or infinity \(model.layers.1.mlp.up_proj.weight\)"):
        sparsify(model, 0.5, calibration=window_NC if calibrated else None, progress=False)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="weights hold NaN"):
        perplexity(model, window_NC)
    with pytest.raises(ValueError, match="weights hold NaN"):
        sample_text(model, 64, progress=False)
