from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import tiny_llama

from torch_prunepath.evaluation import perplexity as evaluate
from torch_prunepath.evaluation.perplexity import decode_speed, perplexity


def test_perplexity_against_its_definition() -> None:
    model = tiny_llama()
    ids = torch.randint(257, (3, 17), generator=torch.Generator().manual_seed(1))
    logs = []
    with torch.no_grad():
        for window in ids:
            for t in range(1, 17):  # every prefix by itself: no token may see a later one, or another window
                logs.append(model(input_ids=window[None, :t]).logits[0, -1].double().log_softmax(-1)[window[t]].item())
    assert perplexity(model, ids) == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-5)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.randint(257, (2, 9))) == pytest.approx(257)


@pytest.mark.parametrize("training", [True, False])
def test_perplexity_leaves_the_mode_as_it_was(training: bool) -> None:
    model = tiny_llama().train(training)
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled())))
    perplexity(model, torch.zeros(1, 4, dtype=torch.int64))
    assert seen == [(False, True)]
    assert model.training is training


def test_perplexity_refuses_nan() -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        perplexity(model, torch.zeros(1, 4, dtype=torch.int64))


def test_decode_speed_times_new_tokens_only_and_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    step_s = iter([9.0, 0.5, 0.25, 0.1])  # warm-up, then three runs: 2, 4 and 10 tokens a second

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def generate(self, prompt_1P, *, attention_mask, generation_config, streamer) -> None:
            nonlocal now
            step = next(step_s)
            streamer.put(prompt_1P)
            now += 1000.0  # the prompt
            for _ in range(generation_config.max_new_tokens):
                streamer.put(torch.zeros(1))
                now += step
            streamer.end()

    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: now))
    assert decode_speed(Model(), torch.zeros(1, 3, dtype=torch.int64), tokens=5, repeats=3) == pytest.approx(4.0)


def test_decode_speed_generates_every_token_with_a_cache() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)  # the end-of-sequence token, 0, is always the most probable
    lengths = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert decode_speed(model, torch.ones(1, 3, dtype=torch.int64), tokens=6, repeats=2) > 0
    assert lengths == [3, 1, 1, 1, 1, 1] * 3
