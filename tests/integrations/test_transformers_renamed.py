"""Classes whose keys transformers renames when it saves and when it loads: what was saved is loaded, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from renamed import (
    Made,
    dino,
    gemma3,
    llava,
    mistral3,
    nemotron_h,
    paligemma,
    qwen2_vl,
    qwen3_vl,
    vit,
    wav2vec2,
)
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

from torch_prunepath import densify, load, sparse_layers, sparsify

MODELS = (vit, dino, llava, gemma3, mistral3, qwen2_vl, qwen3_vl, paligemma, nemotron_h, wav2vec2)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_what_was_saved_is_loaded(make: Callable[[], Made], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    with torch.no_grad():
        dense = model(**inputs)[0]
    sparsify(model, tau=0.5, calibration=inputs, progress=False)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs)[0]
    assert not torch.equal(expected, dense)
    for again in (type(model).from_pretrained(tmp_path), load(tmp_path)):
        again.eval()
        assert list(sparse_layers(again)) == list(sparse_layers(model))
        with torch.no_grad():
            assert torch.equal(again(**inputs)[0], expected)
    densify(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], dense)


@pytest.mark.parametrize("lost", ["router.weight", "permutation"])
def test_a_lost_tensor_is_missed_under_any_name(lost: str, tmp_path: Path) -> None:
    model, inputs = vit()
    sparsify(model, calibration=inputs, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name, *_) = [key for key in tensors if key.endswith(lost)]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged checkpoint: .* is missing from the weights"):
        ViTForImageClassification.from_pretrained(tmp_path)


def test_a_key_mapping_of_one_s_own(tmp_path: Path) -> None:
    """As embedding models are loaded whose files have other names than the class."""
    model, inputs = nemotron_h()
    model.eval()
    sparsify(model, tau=0.5, calibration=inputs, progress=False)
    model.save_pretrained(tmp_path, save_original_format=False)
    file = tmp_path / "model.safetensors"
    save_file({f"mine.{key}": value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path, key_mapping={r"^mine\.": ""})
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], model(**inputs)[0])
    with pytest.raises(ValueError, match="is missing from the weights"):
        type(model).from_pretrained(tmp_path)
