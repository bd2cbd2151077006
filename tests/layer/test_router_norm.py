"""Routers that read normalised tokens: how large a token is changes nothing, wherever such a router is made or kept."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, fit_routers, load, register_routing_hook, set_tau, sparse_layers, sparsify
from torch_prunepath.checkpoint import read_info
from torch_prunepath.commands.cli import COMMANDS, _parser
from torch_prunepath.console.options import options_of
from torch_prunepath.experts import fit
from torch_prunepath.experts.fit import fit_router
from torch_prunepath.layer.router import Router
from torch_prunepath.rms import EPSILON, inverse_rms, normalised

CONFIG = SparsifyConfig(expert_size=8, router_norm=True)
SCALES = torch.tensor([0.1, 1.0, 7.0]).unsqueeze(1)


def sparse(name: str = "llama", **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = ARCHITECTURES[name]()
    config = dataclasses.replace(CONFIG, **changes)
    sparsify(model.eval(), tau=0.5, config=config, calibration=inputs, progress=False)
    return model, inputs


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs)[0]


def assert_blind_to_size(model: nn.Module) -> None:
    layers = sparse_layers(model).values()
    for layer in layers:
        x_TD = 10 * torch.randn(1, layer.ffn.hidden_size).expand(3, -1)
        scores_TE = layer.router(x_TD * SCALES)
        torch.testing.assert_close(scores_TE, scores_TE[:1].expand(3, -1), rtol=1e-3, atol=1e-3)
        assert scores_TE.std() > 0.1
    assert layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 7, 64])
def test_root_mean_square(D: int, dtype: torch.dtype) -> None:
    x = torch.cat([3 * torch.randn(4, D), 1e-3 * torch.randn(2, D), torch.zeros(1, D)]).to(dtype)
    expected = (x.double().square().mean(-1, keepdim=True) + EPSILON).rsqrt().float()
    torch.testing.assert_close(inverse_rms(x), expected)
    torch.testing.assert_close(normalised(x), x.float() * expected)
    assert inverse_rms(x[:0]).shape == (0, 1)


def test_it_is_off_unless_asked_for() -> None:
    assert not SparsifyConfig().router_norm and not Router(3, 2).router_norm
    with pytest.raises(ValueError, match="router_norm='yes' must be True or False"):
        SparsifyConfig(router_norm="yes")  # type: ignore[arg-type]


def test_routers_pickled_under_the_former_name_keep_it() -> None:
    router, x = Router.of(torch.randn(3, 5), None, router_norm=True), torch.randn(2, 5)
    expected = router(x)
    router.normalise = vars(router).pop("router_norm")
    assert not router.router_norm and not torch.equal(router(x), expected)
    again = pickle.loads(pickle.dumps(router))
    assert again.router_norm and not hasattr(again, "normalise") and torch.equal(again(x), expected)


@pytest.mark.parametrize("settings", [{}, {"partition": "kmeans", "router": "centroid", "budget": "uniform"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_sparsify_makes_routers_that_are_blind_to_size(name: str, settings: dict[str, Any]) -> None:
    model, inputs = ARCHITECTURES[name]()
    config = dataclasses.replace(CONFIG, **settings)
    sparsify(model, config=config, calibration=inputs if config.needs_data else None, progress=False)
    assert_blind_to_size(model)


def test_routers_are_fitted_to_normalised_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(x_ND: Tensor, shares_NE: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x_ND)
        return fit_router(x_ND, shares_NE)

    monkeypatch.setattr(fit, "fit_router", watched)
    model, inputs = sparse()
    fit_routers(model, inputs, progress=False)
    assert len(seen) == 2 * len(sparse_layers(model))
    for x_ND in seen:
        torch.testing.assert_close(x_ND.square().mean(-1), torch.ones(len(x_ND)), rtol=1e-3, atol=1e-3)
    assert_blind_to_size(model)


def test_layers_select_the_same_experts_for_a_larger_token() -> None:
    model, _ = sparse()
    masks: list[Tensor] = []
    name = next(iter(sparse_layers(model)))
    with register_routing_hook(model, lambda r: masks.append(r.mask_TE) if r.name == name else None):
        layer = sparse_layers(model)[name]
        x = torch.randn(1, 1, layer.ffn.hidden_size).expand(3, 1, -1) * SCALES.unsqueeze(1)
        layer(x)
    assert (masks[0] == masks[0][0]).all() and not masks[0].all()


def test_gradients_reach_router_and_input_through_a_whole_model() -> None:
    model, inputs = sparse(gate="sigmoid")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in sparse_layers(model).values():
        assert layer.router.weight.grad.any() and layer.router.bias.grad.any()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_checkpoints_keep_it(name: str, tmp_path: Path) -> None:
    model, inputs = sparse(name)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(output(again, inputs), expected)
    assert_blind_to_size(again)
    set_tau(again, 0.5)
    again.save_pretrained(tmp_path / "again")
    info = read_info(tmp_path / "again")
    assert info == read_info(tmp_path)
    assert info["config"]["router_norm"] and all(layer["router_norm"] for layer in info["layers"])


def test_adapters_keep_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from torch_prunepath.integrations.peft import PrunePathConfig

    model, inputs = ARCHITECTURES["llama"]()
    config = PrunePathConfig(tau=0.5, expert_size=8, router_norm=True, calibration=inputs, progress=False)
    adapted = peft.get_peft_model(model, config)
    expected = output(adapted, inputs)
    assert_blind_to_size(adapted)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ARCHITECTURES["llama"]()[0], tmp_path)
    torch.testing.assert_close(output(again, inputs), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-5)
    assert_blind_to_size(merged)


def test_an_adapter_around_a_router_hides_nothing() -> None:
    peft = pytest.importorskip("peft")
    model, _ = sparse()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["router"]))
    set_tau(wrapped, 0.7)  # writes the manifest anew
    assert model.config.quantization_config["shared"]["router_norm"]


@pytest.mark.parametrize(
    "command", [["sparsify", "m", "-o", "d"], ["train", "m", "-o", "d", "--text", "t"], ["sweep", "m", "--tasks", "t"]]
)
def test_commands_take_every_setting(command: list[str]) -> None:
    def settings(*more: str) -> dict[str, Any]:
        found = options_of(COMMANDS[command[0]][0], _parser().parse_args([*command, *more]))
        return found.settings  # type: ignore[no-any-return]

    assert settings() == {}
    assert settings("--router-norm") == {"router_norm": True}
    assert settings("--no-router-norm") == {"router_norm": False}
    own = {"seed"} if command[0] == "train" else set()
    for field in dataclasses.fields(SparsifyConfig):
        if field.name not in own and not isinstance(field.default, bool):
            flag = f"--{field.name.replace('_', '-')}"
            assert settings(flag, str(field.default)) == {field.name: field.default}
