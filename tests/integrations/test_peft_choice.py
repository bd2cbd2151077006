"""PrunePath adapters for some of a model's feed-forward networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import token_ids
from peft import PeftModel, get_peft_model
from tiny_llama import tiny_llama

from torch_prunepath import sparse_layers
from torch_prunepath.integrations.peft import PrunePathConfig


def config(**choice: object) -> PrunePathConfig:
    return PrunePathConfig(tau=0.5, calibration=token_ids(), progress=False, **choice)


@pytest.mark.parametrize("choice", [{"exclude": "layers.0"}, {"include": [lambda spec: spec.name.endswith("1.mlp")]}])
def test_an_adapter_for_one_layer(choice: dict[str, object], tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(**choice))
    names = ["model.layers.1.mlp"]
    assert [name.removesuffix(".prunepath") for name in sparse_layers(model.get_base_model())] == names
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"include", "exclude"} & saved.keys()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        ours, theirs = (each.eval()(input_ids=token_ids()).logits for each in (model, again))
    assert torch.equal(ours, theirs)
    assert list(sparse_layers(model.merge_and_unload())) == names


def test_a_wrong_choice_leaves_the_base_as_it_is() -> None:
    base = tiny_llama()
    with pytest.raises(ValueError, match="include='vision' means no FFN of this model"):
        get_peft_model(base, config(include="vision"))
    assert not any("PrunePath" in type(module).__name__ for module in base.modules())


def test_a_second_adapter_covers_the_same_networks() -> None:
    model = get_peft_model(tiny_llama(), config(exclude="layers.0"))
    with pytest.raises(ValueError, match=r"must cover the same FFNs, but 'model.layers.0.mlp"):
        model.add_adapter("other", config())
    model.add_adapter("other", config(include="layers.1"))
    model.set_adapter("other")
