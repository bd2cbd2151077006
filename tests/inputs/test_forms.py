"""What callers have is told apart element by element, and refused in words."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from tiny_llama import byte_tokenizer, tiny_llama
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from torch_prunepath import SparsifyConfig, fit_routers, set_sparsity, sparsify
from torch_prunepath.evaluation.perplexity import perplexity
from torch_prunepath.inputs.data import as_inputs, iterate_inputs, row_length

MODEL = tiny_llama()
IDS = torch.randint(1, 90, (6, 10), generator=torch.Generator().manual_seed(0))
LISTS = IDS.tolist()
ONES = torch.ones_like(IDS)
TEXTS = ["some text that is long enough", "and more of the same kind"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test of chats."}]


def chatting() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(inputs: dict[str, Any]) -> list[list[int]]:
    """The real tokens of each row."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(
    "data",
    [
        {"input_ids": LISTS},
        {"input_ids": LISTS, "attention_mask": ONES.tolist()},
        BatchEncoding({"input_ids": LISTS, "attention_mask": ONES.tolist()}),
        {"input_ids": IDS.numpy(), "attention_mask": ONES.numpy()},
        {"input_ids": list(IDS)},
        {"input_ids": list(IDS.numpy())},
        {"input_ids": IDS.to(torch.int32)},
        [{"input_ids": row} for row in IDS],
        [{"input_ids": row, "attention_mask": [1] * 10, "labels": row} for row in LISTS],
        [{"input_ids": row} for row in IDS.numpy()],
        [{"input_ids": [row]} for row in LISTS],
        IDS.numpy(),
        IDS.numpy().astype("uint8"),
        list(IDS.numpy()),
        LISTS,
        tuple(map(tuple, LISTS)),
        [LISTS[:2], LISTS[2:]],
        (row for row in LISTS),
        DataLoader([{"input_ids": row} for row in IDS], batch_size=4),
        DataLoader(TensorDataset(IDS), batch_size=4),
        [{"input_ids": row, "attention_mask": [1] * 10, "idx": 3, "label": 0, "text": "x"} for row in LISTS],
        [{"input_ids": row, "attention_mask": None} for row in LISTS],
    ],
)
def test_token_ids_in_every_form(data: Any) -> None:
    inputs = as_inputs(data, MODEL)
    assert inputs["input_ids"].dtype == torch.int64 and torch.equal(inputs["input_ids"], IDS)
    assert inputs.keys() <= {"input_ids", "attention_mask"}
    mask = inputs.get("attention_mask")
    assert mask is None or torch.equal(mask, ONES)


@pytest.mark.parametrize("row", [LISTS[0], IDS[0], IDS[0].numpy(), {"input_ids": LISTS[0]}])
def test_a_single_row(row: Any) -> None:
    assert torch.equal(as_inputs(row, MODEL)["input_ids"], IDS[:1])


@pytest.mark.parametrize("mask", [True, False])
def test_rows_of_different_length_are_padded(mask: bool) -> None:
    ragged = [row[:length] for row, length in zip(LISTS, (10, 3, 7, 0, 1, 9), strict=True)]
    data: dict[str, Any] = {"input_ids": ragged}
    if mask:
        data["attention_mask"] = [[1] * len(row) for row in ragged]
    expected = [row for row in ragged if row]  # a row without tokens is none
    assert rows(as_inputs(data, MODEL)) == expected
    assert rows(as_inputs(ragged, MODEL)) == expected
    assert rows(as_inputs([{key: value[i] for key, value in data.items()} for i in range(6)], MODEL)) == expected


def test_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    tokenised = datasets.Dataset.from_dict({"input_ids": LISTS, "attention_mask": ONES.tolist(), "label": [0] * 6})
    forms = [tokenised, *(tokenised.with_format(name) for name in ("torch", "numpy")), tokenised.to_iterable_dataset()]
    loader = DataLoader(tokenised.with_format("torch"), batch_size=2)
    for data in (*forms, tokenised[:], tokenised["input_ids"], loader):
        assert torch.equal(as_inputs(data, MODEL)["input_ids"], IDS)
    tokenizer = byte_tokenizer()
    expected = as_inputs(TEXTS, MODEL, tokenizer)["input_ids"]
    texts = datasets.Dataset.from_dict({"sentence": TEXTS, "label": [0, 1]})
    for data in (texts, texts.to_iterable_dataset(), texts[:], texts["sentence"], DataLoader(texts, batch_size=2)):
        assert torch.equal(as_inputs(data, MODEL, tokenizer)["input_ids"], expected)
    with pytest.raises(ValueError, match=r"holds texts in its column 'sentence': pass tokenizer="):
        as_inputs(texts, MODEL)
    with pytest.raises(ValueError, match=r"columns of text, 'a', 'b': pass one with tokenizer=, such as data\['a'\]"):
        as_inputs(datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS}), MODEL, tokenizer)
    with pytest.raises(ValueError, match=r"a data set for each of train, test: pass one, such as data\['train'\]"):
        as_inputs(datasets.DatasetDict(train=texts, test=texts), MODEL, tokenizer)
    with pytest.raises(ValueError, match="calibration is empty"):
        as_inputs(texts.select([]), MODEL, tokenizer)
    chats = datasets.Dataset.from_dict({"messages": [CHAT, CHAT], "source": ["a", "b"]})
    expected = as_inputs([CHAT, CHAT], MODEL, chatting())["input_ids"]
    assert torch.equal(as_inputs(chats, MODEL, chatting())["input_ids"], expected)


def test_rows_of_other_inputs_in_a_data_set() -> None:
    datasets = pytest.importorskip("datasets")
    model, inputs = ARCHITECTURES["vit"]()
    pixels = inputs["pixel_values"]
    data = datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "label": [0] * len(pixels)})
    assert torch.allclose(as_inputs(data.with_format("torch"), model)["pixel_values"], pixels)


def test_chats_are_written_by_the_template() -> None:
    tokenizer = chatting()
    text = "<user>What is it?<assistant>A test of chats."
    for data in (CHAT, [CHAT], [CHAT, CHAT], ({"messages": CHAT} for _ in range(2)), {"messages": [CHAT]}):
        found = rows(as_inputs(data, MODEL, tokenizer))
        assert {tokenizer.decode(row) for row in found} == {text}
    with pytest.raises(ValueError, match="chat template"):
        as_inputs(CHAT, MODEL, byte_tokenizer())
    with pytest.raises(ValueError, match="pass tokenizer="):
        as_inputs([CHAT], MODEL)


def test_texts_alone_and_in_batches() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(rows(as_inputs(TEXTS[0], MODEL, tokenizer))[0]) == TEXTS[0]
    expected = as_inputs(TEXTS, MODEL, tokenizer)["input_ids"]
    for data in (iter(TEXTS), tuple(TEXTS), [TEXTS], np.array(TEXTS), DataLoader(TEXTS, batch_size=2)):
        assert torch.equal(as_inputs(data, MODEL, tokenizer)["input_ids"], expected)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"input_ids": IDS, "attention_mask": 0 * ONES}, ValueError, "holds no token: .* all is padding"),
        ({"input_ids": [[], []]}, ValueError, "holds no token"),
        ({"input_ids": []}, ValueError, "holds no token"),
        ([[], []], ValueError, "holds no token"),
        (torch.zeros(3, 0, dtype=torch.long), ValueError, "holds no token"),
        ({"input_ids": IDS, "front_tokens": 10}, ValueError, "holds no token"),
        ({"input_ids": IDS.float()}, TypeError, "'input_ids' must be int64 .* torch.float32"),
        ({"input_ids": "text"}, TypeError, "'input_ids' must be int64 .* not str"),
        ({"input_ids": [["a", "b"]]}, TypeError, "'input_ids' must be int64 .* not str"),
        ({"input_ids": LISTS, "attention_mask": LISTS[:2]}, ValueError, r"attention_mask is \(2, 10\)"),
        ({"input_ids": [LISTS[0], LISTS[1][:3]], "attention_mask": [[1]]}, ValueError, "'attention_mask' has 1"),
        ({}, ValueError, "empty dict"),
        ([{}], ValueError, "empty dict"),
        ([None], TypeError, "must hold texts, .* not NoneType"),
        ([b"bytes"], TypeError, "must hold texts"),
        ([1.5, 2.5], TypeError, "must hold texts, .* torch.float32"),
        ([True, False], TypeError, "must hold texts, .* not bool"),
        ([{"role", "content"}], TypeError, "must hold texts, .* not set"),
        ([(IDS, IDS)], TypeError, "must hold texts"),
        (np.array(3), TypeError, "must hold texts"),
        (np.zeros((2, 3), dtype=complex), TypeError, "must hold texts, .* not ndarray"),
        (["text", {"input_ids": IDS}], ValueError, "mixes texts"),
        ([{"text": "a"}, {"input_ids": IDS}], ValueError, "mixes texts"),
        (
            [{"front_tokens": 1, "input_ids": IDS}, {"front_tokens": 2, "input_ids": IDS}],
            ValueError,
            "differ in 'front",
        ),
    ],
)
def test_refused_in_words(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_inputs(data, MODEL, byte_tokenizer())


def test_a_forward_that_takes_none_of_the_columns() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"holds 'y', none of which Net takes: name the inputs .* \(x\)"):
        as_inputs({"y": torch.zeros(1, 2)}, Net())
    assert as_inputs({"x": torch.zeros(1, 2), "y": torch.zeros(1)}, Net()).keys() == {"x"}


def test_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        as_inputs([{"input_ids": row, "token_type_ids": [0] * 10, "labels": row, "idx": 1} for row in LISTS], MODEL)
    assert "left out token_type_ids, idx, which LlamaForCausalLM does not take" in caplog.text
    model, _ = ARCHITECTURES["bert"]()
    assert "token_type_ids" in as_inputs([{"input_ids": row, "token_type_ids": [0] * 10} for row in LISTS], model)


def test_no_more_is_read_than_is_kept() -> None:
    def endless() -> Any:
        while True:
            yield LISTS[0]

    assert as_inputs(endless(), MODEL, tokens=40)["input_ids"].shape == (4, 10)
    many = [[i % 90] * 2 for i in range(1000)]
    kept = as_inputs(many, MODEL, tokens=20)["input_ids"][:, 0]
    assert len(kept) == 10 and kept[0] == 0 and kept[-1] == 999 % 90


@pytest.mark.parametrize("form", ["rows", "dicts", "texts"])
def test_single_rows_are_measured_together(form: str) -> None:
    data: Any = {"rows": list(IDS), "dicts": [{"input_ids": row} for row in LISTS], "texts": TEXTS * 3}[form]
    batches = iterate_inputs(data * 2, MODEL, byte_tokenizer())
    assert [batch["input_ids"].shape[0] for batch in batches] == [8, 4]


def test_batches_of_one_row_stay_apart() -> None:
    """Whoever made them has a reason: memory, or shapes that do not go together."""
    model, inputs = ARCHITECTURES["vit"]()
    pixels = inputs["pixel_values"][:1]
    batches = iterate_inputs([{"input_ids": row[None]} for row in IDS], MODEL)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 10)] * 6
    assert len(iterate_inputs([{"pixel_values": pixels}, {"pixel_values": pixels[..., :-1]}], model)) == 2


def test_rows_of_padding_alone_are_passed_over() -> None:
    mask = ONES.clone()
    mask[2] = 0
    data = [{"input_ids": row, "attention_mask": keep} for row, keep in zip(IDS, mask, strict=True)]
    assert rows(as_inputs(data, MODEL)) == LISTS[:2] + LISTS[3:]
    for batch in iterate_inputs([{key: value[None] for key, value in row.items()} for row in data], MODEL):
        assert batch["attention_mask"].all()


SMALL = SparsifyConfig(expert_size=8)
FITS = {"sparsify": 0, "set_sparsity": 1, "fit_routers": 1, "perplexity": 2}


@pytest.mark.parametrize("use", FITS)
@pytest.mark.parametrize("wrong", [257, 9999, -1, -100])
def test_ids_outside_the_vocabulary(use: str, wrong: int) -> None:
    model = tiny_llama() if use in ("sparsify", "perplexity") else sparsify(tiny_llama(), 0.7, calibration=IDS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = IDS.clone()
    ids[3, 4] = wrong
    with pytest.raises(ValueError, match=rf"token id {wrong}, but the model has 257 token ids"):
        if use == "sparsify":
            sparsify(model, 0.5, calibration={"input_ids": ids.tolist()}, progress=False)
        elif use == "set_sparsity":
            set_sparsity(model, 0.3, [IDS, ids], progress=False)
        elif use == "fit_routers":
            fit_routers(model, ids, progress=False)
        else:
            perplexity(model, ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_a_tokenizer_of_another_model() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    with pytest.raises(ValueError, match="token id 258, but the tokenizer has 259 and the model 257 token ids"):
        as_inputs("here is <one> and <two>", MODEL, tokenizer)


def test_places_of_images_may_lie_beyond_the_vocabulary() -> None:
    model = tiny_llama()
    model.config.image_token_id = 300
    ids = IDS.clone()
    ids[0, 0] = 300
    assert torch.equal(as_inputs(ids, model)["input_ids"], ids)


def test_a_text_longer_than_a_row() -> None:
    inputs = as_inputs("word " * 200, MODEL, byte_tokenizer())
    assert inputs["input_ids"].shape[1] == row_length(MODEL)


def test_rests_of_texts_are_left_out_where_there_is_more() -> None:
    tokenizer = byte_tokenizer()
    assert len(as_inputs([TEXTS[0], "short"], MODEL, tokenizer)["input_ids"]) == 1
    assert len(as_inputs(["short", "abc"], MODEL, tokenizer)["input_ids"]) == 2
