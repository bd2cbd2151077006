"""Static pruning: which neurons leave, that what stays computes as before without them, and nothing half done."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from torch import Tensor, nn

from torch_prunepath import find_ffns, sparsify
from torch_prunepath.baselines import prune, train_dense
from torch_prunepath.baselines import pruning as module
from torch_prunepath.inputs.data import as_inputs
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.train import TrainConfig

ALL = {**ARCHITECTURES, **HAND_WRITTEN}
FIXED_WIDTH = {"bloom", "mpt"}  # their configs have no field for it


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def views_of(model: nn.Module) -> list[FFNView]:
    return [FFNView(model, spec) for spec in find_ffns(model)]


def zeroed(model: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """A copy in which the other neurons contribute nothing."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for view in views_of(other):
            gone = torch.ones(view.spec.ffn_size, dtype=torch.bool)
            gone[kept[view.site]] = False
            view.down_FD[gone] = 0.0
    return other


@pytest.mark.parametrize("name", list(ALL))
def test_what_stays_computes_as_if_the_others_were_zero(name: str) -> None:
    model, inputs = ALL[name]()
    before, dense = {view.site: view.spec.ffn_size for view in views_of(model)}, copy.deepcopy(model)
    result = prune(model, 0.4, dict(inputs), progress=False)
    widths = {view.site: view.spec.ffn_size for view in views_of(model)}
    assert widths == {site: max(1, round(0.6 * F)) for site, F in before.items()}, "found again, and narrower"
    assert widths == {site: len(index) for site, index in result.kept.items()}
    torch.testing.assert_close(
        output_of(model, inputs), output_of(zeroed(dense, result.kept), inputs), rtol=1e-4, atol=1e-5
    )
    assert result.sparsity == pytest.approx(1 - sum(widths[s] / before[s] for s in widths) / len(widths))
    assert result.storable is (None if name in HAND_WRITTEN else name not in FIXED_WIDTH)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - FIXED_WIDTH))
def test_it_saves_and_loads_as_an_ordinary_model(name: str, tmp_path: Path) -> None:
    model, inputs = ALL[name]()
    prune(model, 0.5, dict(inputs), progress=False)
    model.save_pretrained(tmp_path)
    loaded, notes = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(output_of(loaded.eval(), inputs), output_of(model, inputs))


@pytest.mark.parametrize("name", sorted(FIXED_WIDTH))
def test_a_config_that_cannot_say_the_width_is_warned_about(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = ALL[name]()
    before = model.config.to_dict()
    with caplog.at_level(logging.WARNING):
        assert prune(model, 0.5, dict(inputs), progress=False).storable is False
    assert "from_pretrained" in caplog.text and model.config.to_dict() == before


def test_a_width_that_another_field_shares_is_told_apart() -> None:
    """F = the number of positions: only one of the two fields gives the shapes that the model has."""
    model, inputs = ALL["gpt_neox"]()
    config = copy.deepcopy(model.config)
    config.intermediate_size = config.max_position_embeddings = config.hidden_size * 2
    model = type(model)(config).eval()
    assert prune(model, 0.5, dict(inputs), progress=False).storable
    assert model.config.intermediate_size == 32


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_scores_are_what_they_are_called(name: str) -> None:
    model, inputs = ALL[name]()
    views, inputs = views_of(model), as_inputs(inputs, model)
    hidden: dict[str, Tensor] = {}
    visit_inputs(model, views, inputs, lambda view, x: hidden.__setitem__(view.site, view.hidden(x).double()))
    norm = module.neuron_scores(model, views, inputs, "norm", progress=False)
    rms = module.neuron_scores(model, views, inputs, "rms", progress=False)
    wanda = module.neuron_scores(model, views, inputs, "wanda", progress=False)
    for view in views:
        h, down = hidden[view.site], view.down_FD.detach().double()
        each_FN = torch.stack([(h[:, f, None] * down[f]).norm(dim=-1) for f in range(view.spec.ffn_size)])
        torch.testing.assert_close(norm[view.site], each_FN.mean(-1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(rms[view.site], each_FN.square().mean(-1).sqrt(), rtol=1e-4, atol=1e-7)
        per_weight = down.t().abs() * h.norm(dim=0)  # Wanda's [D, F], with the mean square for the sum
        torch.testing.assert_close(wanda[view.site], per_weight.sum(0) / len(h) ** 0.5, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", ["norm", "rms", "wanda"])
def test_the_lowest_scores_leave(score: Any) -> None:
    model, inputs = ALL["llama"]()
    scores = module.neuron_scores(model, views_of(model), as_inputs(inputs, model), score, progress=False)
    kept = prune(model, 0.5, dict(inputs), score=score, progress=False).kept
    for site, index in kept.items():
        gone = torch.ones(37, dtype=torch.bool)
        gone[index] = False
        assert scores[site][index].min() >= scores[site][gone].max() and (index.diff() > 0).all()


@settings(max_examples=15, deadline=None)
@given(a=st.floats(0, 0.99), b=st.floats(0, 0.99))
def test_a_higher_sparsity_keeps_a_subset(a: float, b: float) -> None:
    kept = []
    for sparsity in sorted((a, b)):
        model, inputs = ALL["llama"]()
        kept.append(prune(model, sparsity, dict(inputs), progress=False).kept)
    for site in kept[0]:
        assert set(kept[1][site].tolist()) <= set(kept[0][site].tolist()) and len(kept[1][site]) >= 1


def test_zero_changes_nothing() -> None:
    model, inputs = ALL["gpt2"]()
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    result = prune(model, 0.0, dict(inputs), progress=False)
    assert result.sparsity == 0 and result.storable and model.config.to_dict() == config
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "t5", "fused_up_first"])
@pytest.mark.parametrize("where", ["_narrow", "tell_config"])
def test_what_fails_half_way_leaves_the_model_as_it_was(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ALL[name]()
    output, before = output_of(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    specs, config = find_ffns(model), copy.deepcopy(getattr(model, "config", None))
    real, calls = getattr(module, where), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if where == "tell_config" or len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(KeyboardInterrupt):
        prune(model, 0.5, dict(inputs), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(output_of(model, inputs), output) and find_ffns(model) == specs
    assert config is None or model.config.to_dict() == config.to_dict()


def test_it_trains_on_the_same_loop_and_can_be_made_sparse() -> None:
    model = tiny_llama()
    data = [{"input_ids": torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))}]
    loss = model(**data[0], labels=data[0]["input_ids"]).loss
    loss.backward()  # gradients of the old shapes
    prune(model, 0.5, data, progress=False)
    parameters = {id(p) for p in model.parameters()}
    history = train_dense(model, data, TrainConfig(steps=40, lr=3e-3), progress=False)
    assert history[-1]["task"] < 0.5 * history[0]["task"] and history[0]["sparsity"] == 0
    assert {id(p) for p in model.parameters()} == parameters
    sparsify(model, tau=0.5, calibration=data, progress=False)
    assert torch.isfinite(output_of(model, data[0])).all()


def test_bfloat16_weights() -> None:
    model, inputs = ALL["llama"]()
    model.bfloat16()
    prune(model, 0.5, dict(inputs), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(output_of(model, inputs)).all()


@pytest.mark.gpu
def test_on_a_cuda_device() -> None:
    model, inputs = ALL["llama"]()
    on_device = {key: value.cuda() for key, value in inputs.items()}
    prune(model.cuda(), 0.5, on_device, progress=False)
    assert all(p.is_cuda for p in model.parameters()) and torch.isfinite(output_of(model, on_device)).all()


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    model, inputs = ALL["bert"]()
    for sparsity in (-0.1, 1.0):
        with pytest.raises(ValueError, match="outside"):
            prune(model, sparsity, inputs, progress=False)
    with pytest.raises(ValueError, match="'norm', 'rms', 'wanda'"):
        prune(model, 0.5, inputs, score="taylor", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass calibration="):
        prune(model, 0.5, progress=False)
    with pytest.raises(ValueError, match="no feed-forward network"):
        prune(nn.Linear(3, 3), 0.5, {"input": torch.ones(1, 3)}, progress=False)
    assert find_ffns(model)[0].ffn_size == 37
