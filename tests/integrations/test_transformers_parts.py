"""What is saved is described as it is then: a part of a model made sparse, layers moved since, a dense model."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomise
from renamed import gemma3, llava
from tiny_llama import byte_tokenizer, tiny_llama
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaForQuestionAnswering,
    T5EncoderModel,
    T5ForConditionalGeneration,
    pipeline,
)

from torch_prunepath import SparsifyConfig, densify, describe, load, rebuild, set_tau, sparse_layers, sparsify
from torch_prunepath.baselines import lte

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs)[0]
    return found


def budgets(model: nn.Module) -> list[tuple[float, float]]:
    return [(layer.budget, float(layer.tau)) for layer in sparse_layers(model).values()]


def check_round_trip(model: Any, inputs: dict[str, Any], folder: Path) -> Any:
    """Save and load; the loaded model is as sparse, and computes the same."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert list(sparse_layers(again)) == list(sparse_layers(model))
    assert budgets(again) == budgets(model)
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert torch.equal(output(load(folder), inputs), output(model, inputs))
    return again


# --- a part made sparse, the whole saved ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llava, gemma3], ids=lambda make: make.__name__)
def test_the_language_model_of_a_vision_language_model(make: Any, tmp_path: Path) -> None:
    model, inputs = make()
    dense = output(model, inputs)
    sparsify(model.model.language_model, 0.3, config=CONFIG, progress=False)
    assert not torch.equal(output(model, inputs), dense)
    check_round_trip(model, inputs, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert len(config["quantization_config"]["layers"]) == 2
    assert "quantization_config" not in config["text_config"], "its names begin at the language model"
    # The part alone, and the whole again after it.
    part = model.model.language_model
    part.save_pretrained(tmp_path / "part")
    again = type(part).from_pretrained(tmp_path / "part")
    assert list(sparse_layers(again)) == ["layers.0.mlp", "layers.1.mlp"]
    set_tau(model, 0.7)
    check_round_trip(model, inputs, tmp_path / "later")
    densify(part)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    torch.testing.assert_close(output(model, inputs), dense)


@pytest.mark.parametrize("part", ["encoder", "decoder", "encoder.block.0.layer.1"])
def test_a_part_of_a_sequence_to_sequence_model(part: str, tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES["t5_gated"]()
    sparsify(model.get_submodule(part), 0.3, config=CONFIG, progress=False)
    assert all(name.startswith(part) for name in sparse_layers(model))
    check_round_trip(model, inputs, tmp_path)


@pytest.mark.parametrize("part", ["model.layers", "model.layers.1", "model.layers.1.mlp"])
def test_modules_without_a_config(part: str, tmp_path: Path) -> None:
    """Also a feed-forward network by itself, which has no name there."""
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model.get_submodule(part), 0.3, config=CONFIG, progress=False)
    check_round_trip(model, inputs, tmp_path)


def test_two_parts_made_in_two_ways(tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES["llama"]()
    other = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform", seed=7)
    sparsify(model.model.layers[0], 0.3, config=CONFIG, progress=False)
    sparsify(model.model.layers[1], 0.6, config=other, progress=False)
    again = check_round_trip(model, inputs, tmp_path)
    assert [layer.made_with for layer in sparse_layers(again).values()] == [CONFIG, other]
    assert describe(again) == describe(model)


def test_a_bert_inside_of_one_s_own_classifier(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = ARCHITECTURES["bert"]()
            self.head = nn.Linear(32, 2)

    whole, (_, inputs) = Classifier(), ARCHITECTURES["bert"]()
    sparsify(whole, 0.3, config=CONFIG, progress=False)
    check_round_trip(whole.inner, inputs, tmp_path)


def test_a_sentence_transformer_as_a_whole(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer, base, out = byte_tokenizer(), tmp_path / "base", tmp_path / "out"
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    randomise(BertModel(BertConfig(vocab_size=len(tokenizer), **small))).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encoder = sentence_transformers.SentenceTransformer(str(base), device="cpu")
    sparsify(encoder, 0.3, config=CONFIG, progress=False)
    expected = encoder.encode(["some text"], convert_to_tensor=True)
    encoder.save(str(out))
    again = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert len(sparse_layers(again)) == 2
    assert torch.equal(again.encode(["some text"], convert_to_tensor=True), expected)


def test_a_baseline_inside_of_a_model_cannot_be_saved_with_it(tmp_path: Path) -> None:
    model, _ = ARCHITECTURES["llama"]()
    lte(model.model, expert_size=8, progress=False)
    for whole in (model, model.model):
        with pytest.raises(ValueError, match="checkpoints cannot hold"):
            whole.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- layers dropped, moved, repeated ----------------------------------------------------------------------------------


ORDERS = {"dropped": [0, 2], "reversed": [2, 1, 0], "repeated": [0, 1, 1, 2]}


@pytest.mark.parametrize("order", ORDERS)
def test_layers_are_saved_where_they_are(order: str, tmp_path: Path) -> None:
    model: Any = tiny_llama(num_hidden_layers=3)
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    sparsify(model, 0.5, config=SparsifyConfig(expert_size=8), calibration=ids, progress=False)
    assert len(set(budgets(model))) == 3, "every layer has a budget of its own"
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList(copy.deepcopy(layers[i]) for i in ORDERS[order])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(model.model.layers)
    inputs = {"input_ids": ids[:2, :9], "use_cache": False}
    again = check_round_trip(model, inputs, tmp_path / "moved")
    set_tau(model, 0.7)
    set_tau(again, 0.7)
    assert budgets(again) == budgets(model)
    check_round_trip(model, inputs, tmp_path / "moved, and tau changed")


# --- a dense model with a sparse config -------------------------------------------------------------------------------


def test_a_dense_model_writes_no_manifest(tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model, 0.5, config=CONFIG, progress=False).save_pretrained(tmp_path / "sparse")
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "sparse"))
    with pytest.raises(ValueError, match=r"that of a sparse checkpoint: load that one with from_pretrained"):
        sparsify(fresh, config=CONFIG, progress=False)
    fresh.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(output(again, inputs), output(fresh, inputs))
    sparsify(fresh, config=CONFIG, progress=False)  # the stale manifest is gone


def test_a_config_with_another_quantisation_is_not_overwritten(tmp_path: Path) -> None:
    model, _ = ARCHITECTURES["llama"]()
    sparsify(model, 0.5, config=CONFIG, progress=False)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="carries another quantization_config"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5_gated", "phi3"])
@pytest.mark.parametrize("as_dict", [False, True], ids=["manifest", "dict"])
def test_rebuild_makes_what_a_state_dict_fills(name: str, as_dict: bool, tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES[name]()
    sparsify(model, 0.4, config=CONFIG, progress=False)
    manifest = describe(model)
    torch.save((manifest.to_dict(), model.state_dict()), tmp_path / "sparse.pt")
    stored, weights = torch.load(tmp_path / "sparse.pt", weights_only=True)
    fresh, _ = ARCHITECTURES[name]()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert rebuild(fresh, stored if as_dict else manifest) is fresh
    fresh.load_state_dict(weights)
    assert torch.equal(output(fresh, inputs), output(model, inputs))
    assert budgets(fresh) == budgets(model) and describe(fresh) == manifest
    for key, value in model.state_dict().items():
        assert value.stride() == fresh.state_dict()[key].stride(), f"{key}: laid out as before"
    check_round_trip(fresh, inputs, tmp_path / "saved")


def test_rebuild_refuses_before_anything_is_changed() -> None:
    model, _ = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match="holds no sparse FFN"):
        describe(model)
    sparsify(model, 0.5, config=CONFIG, progress=False)
    manifest = describe(model)
    with pytest.raises(ValueError, match=r"sparse already: rebuild a dense one"):
        rebuild(model, manifest)
    with pytest.raises(ValueError, match="damaged prunepath manifest"):
        rebuild(ARCHITECTURES["llama"]()[0], {})
    with pytest.raises(TypeError, match=r"a model \(torch.nn.Module\) is needed, not a str"):
        rebuild("model", manifest)  # type: ignore[type-var]
    other, _ = ARCHITECTURES["gpt2"]()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none"):
        rebuild(other, manifest)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


# --- a class that has a part of what was saved ------------------------------------------------------------------------


def test_the_encoder_of_a_sequence_to_sequence_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = ARCHITECTURES["t5_gated"]()
    assert isinstance(model, T5ForConditionalGeneration)
    sparsify(model, 0.4, config=CONFIG, progress=False)
    model.save_pretrained(tmp_path / "whole")
    with caplog.at_level(logging.INFO, logger="torch_prunepath"):
        encoder = T5EncoderModel.from_pretrained(tmp_path / "whole")
    assert "T5EncoderModel has 2 of the checkpoint's 4 sparse FFNs" in caplog.text
    assert list(sparse_layers(encoder)) == [name for name in sparse_layers(model) if name.startswith("encoder")]
    ids = {"input_ids": inputs["input_ids"]}
    assert torch.equal(output(encoder, ids), output(model.encoder, ids))
    check_round_trip(encoder, ids, tmp_path / "encoder")


def test_the_decoder_of_a_sequence_to_sequence_model(tmp_path: Path) -> None:
    small = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = BartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, **small)
    model = randomise(BartForConditionalGeneration(config))
    sparsify(model, 0.4, config=CONFIG, progress=False)
    model.save_pretrained(tmp_path / "whole")
    decoder = BartForCausalLM.from_pretrained(tmp_path / "whole")
    assert len(sparse_layers(decoder)) == 2
    # This class finds no embeddings in the dense checkpoint either.
    decoder.model.decoder.embed_tokens.weight.data = model.model.decoder.embed_tokens.weight.data
    ids = torch.arange(3, 12)[None]
    found, expected = (output(whole.model.decoder, {"input_ids": ids}) for whole in (decoder, model))
    assert torch.equal(found, expected)


def test_fewer_layers_than_were_saved(tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model, 0.4, config=CONFIG, progress=False).save_pretrained(tmp_path)
    short = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)
    assert list(sparse_layers(short)) == ["model.layers.0.mlp"]
    model.model.layers = model.model.layers[:1]
    assert torch.equal(output(short, {**inputs, "use_cache": False}), output(model, {**inputs, "use_cache": False}))


def test_a_class_with_none_of_the_layers_is_refused(tmp_path: Path) -> None:
    """transformers drops all of the dense model's weights there, too."""
    model, _ = ARCHITECTURES["llama"]()
    sparsify(model, 0.4, config=CONFIG, progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForQuestionAnswering has none"):
        LlamaForQuestionAnswering.from_pretrained(tmp_path)


def test_a_router_is_missed_though_another_part_has_one_like_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = ARCHITECTURES["t5_gated"]()
    sparsify(model, 0.4, config=CONFIG, progress=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (lost, *_) = [key for key in tensors if key.startswith("encoder") and key.endswith("router.weight")]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    for cls in (T5EncoderModel, T5ForConditionalGeneration):
        with pytest.raises(ValueError, match=rf"{lost} is missing from the weights"):
            cls.from_pretrained(tmp_path)


# --- pipelines --------------------------------------------------------------------------------------------------------

READERS = [name for name, make in ARCHITECTURES.items() if set(make()[1]) == {"input_ids"}]


@pytest.mark.parametrize("name", [n for n in READERS if hasattr(ARCHITECTURES[n]()[0], "save_pretrained")])
def test_pipelines_load_every_class_that_reads_text(name: str, tmp_path: Path) -> None:
    model, _ = ARCHITECTURES[name]()
    sparsify(model, 0.4, config=CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    text = "TO-BE-OR-NOT-42"  # bytes that the small vocabularies have
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert int(ids.max()) < 96
    reader = pipeline("feature-extraction", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    assert list(sparse_layers(reader.model)), "sparse in the pipeline, too"
    found = torch.tensor(reader(text))
    base = getattr(model, model.base_model_prefix, model)
    assert torch.equal(found, output(base, {"input_ids": ids})[None].reshape(found.shape))
