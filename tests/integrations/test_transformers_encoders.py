"""Encoders that classify, and encoder-decoders, through the same calls: sparsify, set_sparsity, save, load, Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, ENCODER, T5, TOKENS, VOCABULARY, randomise
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from torch_prunepath import (
    SparsifyConfig,
    densify,
    record_sparsity,
    register_routing_hook,
    set_sparsity,
    set_tau,
    sparse_layers,
    sparsify,
)
from torch_prunepath.inputs.padding import PaddingTracker

SIGMOID = SparsifyConfig(expert_size=4, gate="sigmoid", gate_offset=2.0)
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 37, "n_layers": 2, "n_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "DistilBert": DISTIL,
    "ModernBert": {**ENCODER, "cls_token_id": 1, "sep_token_id": 2},
    "Albert": {**ENCODER, "embedding_size": 16},
}


def classifier(family: str) -> nn.Module:
    config = getattr(hf, f"{family}Config")(**{**TOKENS, **FAMILIES[family]}, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        return randomise(getattr(hf, f"{family}ForSequenceClassification")(config))


def t5(act: str = "relu") -> Any:
    config = hf.T5Config(**{**TOKENS, **T5}, feed_forward_proj=act, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        return randomise(hf.T5ForConditionalGeneration(config))


def bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 37, "decoder_ffn_dim": 41}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCABULARY}
    config = hf.BartConfig(**{**TOKENS, **sizes, **heads}, max_position_embeddings=64, decoder_start_token_id=0)
    return randomise(hf.BartForConditionalGeneration(config))


def padded(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


def arguments(folder: Path, cls: Any = TrainingArguments, **settings: Any) -> Any:
    return cls(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def router_moved(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether training has changed every router."""
    after = model.state_dict()
    return not any(torch.equal(before[name], after[name]) for name in before if "router.weight" in name)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_classification(family: str, tmp_path: Path) -> None:
    model, batch = classifier(family), padded([9, 6, 4, 9])
    dense = output(model, batch)
    sparsify(model, 1.0, config=SIGMOID, calibration=batch, progress=False)
    set_sparsity(model, 0.4, batch, progress=False)
    with record_sparsity(model) as record:
        sparse = output(model, batch)
    assert record.sparsity == pytest.approx(0.4, abs=0.02) and sparse.shape == dense.shape == (4, 3)
    assert record.tokens % 28 == 0, "padding left out, shared layers counted each time"
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(again, batch), sparse)

    rows = [{**{k: v[i] for k, v in batch.items()}, "labels": torch.tensor(i % 3)} for i in range(4)]
    before = copied(again)
    history = trained(Trainer, again, arguments(tmp_path / "run"), rows)
    assert history[-1]["train_loss"] > 0 and router_moved(again, before)
    again.save_pretrained(tmp_path / "trained")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert torch.equal(output(after, batch), output(again, batch))
    densify(model)
    assert torch.equal(output(model, batch), dense)


def trained(cls: Any, model: nn.Module, args: Any, rows: Any, **settings: Any) -> list[dict[str, float]]:
    run = cls(model, args, train_dataset=rows, **settings)
    run.train()
    return list(run.state.log_history)


class PaddingOnly:
    """As much of a tokenizer as the collator needs."""

    padding_side = "right"

    def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in features]
        batch = padded(lengths)
        for i, row in enumerate(features):
            batch["input_ids"][i, : lengths[i]] = torch.tensor(row["input_ids"])
        return batch


@pytest.mark.parametrize("make", [t5, lambda: t5("gated-gelu"), bart], ids=["t5", "t5 gated", "bart"])
def test_sequence_to_sequence(make: Callable[[], Any], tmp_path: Path) -> None:
    model, batch = make(), padded([9, 6, 4, 9])
    target = padded([7, 7, 3, 5], seed=1)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    dense = output(model, {**batch, "labels": labels})
    sparsify(model, 1.0, config=SIGMOID, calibration={**batch, "labels": labels}, progress=False)
    found = set_sparsity(model, 0.4, {**batch, "labels": labels}, progress=False)
    assert 0 < found < 1
    sparse = output(model, {**batch, "labels": labels})
    assert not torch.allclose(sparse, dense)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(again, {**batch, "labels": labels}), sparse)
    written = [m.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False) for m in (model, again)]
    assert torch.equal(*written)

    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [
        {"input_ids": batch["input_ids"][i, : lengths[i]].tolist(), "labels": labels[i][labels[i] >= 0].tolist()}
        for i in range(4)
    ]
    before = copied(again)
    collator = DataCollatorForSeq2Seq(PaddingOnly(), again)
    settings = arguments(tmp_path / "run", Seq2SeqTrainingArguments)
    history = trained(Seq2SeqTrainer, again, settings, rows, data_collator=collator)
    assert history[-1]["train_loss"] > 0 and router_moved(again, before)
    set_tau(model, 1.0)
    densify(model)
    assert torch.equal(output(model, {**batch, "labels": labels}), dense)


# --- padding ----------------------------------------------------------------------------------------------------------

SOURCE, TARGET = [9, 6, 4, 9], [7, 7, 3, 5]


def targets() -> dict[str, tuple[dict[str, Tensor], list[int]]]:
    """What a decoder may be given, and how many tokens of each row count then."""
    target = padded(TARGET, seed=1)
    ids, mask = target["input_ids"], target["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100  # a prompt is no padding
    return {
        "decoder mask": ({"decoder_input_ids": ids, "decoder_attention_mask": mask}, TARGET),
        "no decoder mask": ({"decoder_input_ids": ids}, [7] * 4),
        "shorter than the source": ({"decoder_input_ids": ids[:, :4]}, [4] * 4),
        "longer than the source": ({"decoder_input_ids": ids.repeat(1, 2)}, [14] * 4),
        "as long as the source": ({"decoder_input_ids": torch.cat([ids, ids[:, :2]], 1)}, [9] * 4),
        "labels": ({"labels": labels}, TARGET),
        "labels and ids": ({"decoder_input_ids": ids, "labels": labels}, TARGET),
        "labels and mask": ({"labels": labels, "decoder_attention_mask": torch.ones_like(mask)}, [7] * 4),
    }


@pytest.mark.parametrize("how", list(targets()))
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_a_decoder_does_not_take_the_encoder_s_padding(family: str, how: str) -> None:
    model = t5() if family == "T5" else bart()
    plain = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform")
    sparsify(model, 0.5, config=plain, progress=False)
    inputs, counts = targets()[how]
    with PaddingTracker(model) as tracker:
        kept: dict[str, list[int]] = {}

        def note(routing: Any) -> None:
            keep, (B, T) = tracker.keep(routing.shape), routing.shape
            kept[routing.name] = [T] * B if keep is None else keep.reshape(B, T).sum(1).tolist()

        with register_routing_hook(model, note), torch.no_grad():
            model(**padded(SOURCE), **inputs)
    assert kept == {name: SOURCE if "encoder" in name else counts for name in sparse_layers(model)}


def test_a_mask_over_sound_is_not_one_over_tokens() -> None:
    model, inputs = ARCHITECTURES["whisper"]()
    plain = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform")
    sparsify(model, 0.5, config=plain, progress=False)
    frames = torch.ones(2, 24, dtype=torch.long)
    frames[0, 12:] = 0
    with record_sparsity(model) as record, torch.no_grad():
        model(**inputs, attention_mask=frames)
    found = {name: int(tally.tokens) for name, tally in record._tallies.items()}
    assert found == {name: 2 * 12 if "encoder" in name else 2 * 7 for name in sparse_layers(model)}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_a_decoder_writes_counts(beams: int, cache: str) -> None:
    model = t5()
    plain = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform")
    sparsify(model, 0.5, config=plain, progress=False)
    tokens: dict[str, int] = {}
    with record_sparsity(model) as record:
        model.generate(
            **padded(SOURCE),
            max_new_tokens=5,
            min_new_tokens=5,
            num_beams=beams,
            do_sample=False,
            cache_implementation=cache,
        )
        tokens = {name: int(tally.tokens) for name, tally in record._tallies.items()}
    expected = {name: sum(SOURCE) if "encoder" in name else 5 * 4 * beams for name in sparse_layers(model)}
    assert tokens == expected
