"""Every baseline on a real language model, SmolLM2-135M: the orders that any sound implementation gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from torch_prunepath import record_sparsity, register_routing_hook, set_tau
from torch_prunepath.baselines import cats, d2dmoe, lte, moefication, prune, teal
from torch_prunepath.evaluation.corpus import help_topics, windows
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch, load_gguf
from torch_prunepath.evaluation.perplexity import perplexity

pytestmark = [pytest.mark.network, pytest.mark.slow]
HALF = 0.5


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, windows to calibrate on, others to measure on."""
    model, tokenizer = load_gguf(fetch(SMOLLM2, cache_folder()))
    corpus = help_topics()
    fit = windows(corpus.calibration, tokenizer, context=256, count=6, part="text for calibration")
    test = windows(corpus.held_out, tokenizer, context=256, count=2, part="held-out text")
    return model, fit, test


def test_thresholds_on_neurons_beat_static_neurons(loaded: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    model, fit, test = loaded
    dense = perplexity(model, test)
    found = {}
    for name, method in (("cats", cats), ("teal", partial(teal, allocation="uniform"))):
        with method(model, HALF, fit, progress=False) as handle, handle.record() as record:
            found[name] = perplexity(model, test)
        assert record.sparsity == pytest.approx(HALF, abs=0.06)
    assert perplexity(model, test) == pytest.approx(dense, rel=1e-5)
    other, _ = load_gguf(fetch(SMOLLM2, cache_folder()))
    assert prune(other, HALF, fit, progress=False).storable
    assert other.config.intermediate_size == 768
    assert dense < found["teal"] < perplexity(other, test)
    assert dense < found["cats"] < perplexity(other, test)


@pytest.mark.parametrize("name", ["moefication", "d2dmoe"])
def test_routers_beat_chance_and_leave_the_model_as_it_was(
    loaded: tuple[Any, torch.Tensor, torch.Tensor], name: str
) -> None:
    model, fit, test = loaded
    dense = perplexity(model, test)
    method = moefication if name == "moefication" else d2dmoe
    with method(model, fit, epochs=8, progress=False) as handle:
        handle.set_sparsity(HALF, fit[:1])
        with record_sparsity(model) as record:
            routed = perplexity(model, test)
        assert record.sparsity == pytest.approx(HALF, abs=0.04)
        generator = torch.Generator().manual_seed(0)
        with register_routing_hook(model, lambda r: torch.rand(r.mask_TE.shape, generator=generator) >= HALF):
            chance = perplexity(model, test)
        set_tau(model, 1.0)
        assert perplexity(model, test) == pytest.approx(dense, rel=1e-3)
    assert dense < routed < 0.5 * chance
    assert perplexity(model, test) == pytest.approx(dense, rel=1e-5)


def test_lte_takes_the_model_s_size(loaded: tuple[Any, torch.Tensor, torch.Tensor]) -> None:
    model, fit, test = loaded
    dense = perplexity(model, test)
    with lte(model, progress=False) as handle:
        assert all(layer.router.weight.shape == (48, 576) for layer in handle.layers.values())
        handle.start_second_stage()
        handle.set_sparsity(0.3, fit[:1])
        with record_sparsity(model) as record:
            assert perplexity(model, test) > dense
        assert record.sparsity == pytest.approx(0.3, abs=0.05)
