"""Thresholds on a real model, SmolLM2-135M-Instruct from its wheel, against an implementation by hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_prunepath import (
    Routing,
    SparsifyConfig,
    densify,
    record_sparsity,
    register_routing_hook,
    set_threshold_shares,
    sparse_layers,
    sparsify,
)
from torch_prunepath.evaluation.corpus import help_topics, windows
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch, load_gguf
from torch_prunepath.evaluation.perplexity import perplexity

pytestmark = [pytest.mark.network, pytest.mark.slow]


def masked_by_hooks(sparse: nn.Module) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """A dense twin, neurons in expert order, that drops what the definition drops; and the masks that it waits for."""
    layers = sparse_layers(sparse)
    thetas = {name: (float(layer.theta_x), float(layer.theta_h)) for name, layer in layers.items()}
    size = next(iter(layers.values())).experts.expert_size
    dense = copy.deepcopy(sparse)
    for layer in sparse_layers(dense).values():
        layer.permutation.copy_(torch.arange(layer.ffn.ffn_size))
    densify(dense)
    masks: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook_into(name: str, mlp: Any) -> None:
        theta_x, theta_h = thetas[name]
        column_D = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach().norm(dim=0).float()
        row_F = mlp.down_proj.weight.detach().norm(dim=0).float()

        def inputs(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] * (args[0].float().abs() * column_D >= theta_x),)

        def neurons(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            active = masks[name].pop(0).repeat_interleave(size, 1)[:, : args[0].shape[-1]]
            return (args[0] * (args[0].float().abs() * row_F >= theta_h) * active.view(args[0].shape),)

        mlp.gate_proj.register_forward_pre_hook(inputs)
        mlp.up_proj.register_forward_pre_hook(inputs)
        mlp.down_proj.register_forward_pre_hook(neurons)

    for name in layers:
        hook_into(name, dense.get_submodule(name))
    return dense, masks


def test_perplexity_is_that_of_hooks_on_the_dense_model() -> None:
    model, tokenizer = load_gguf(fetch(SMOLLM2, cache_folder()))
    corpus = help_topics()
    fit = windows(corpus.calibration, tokenizer, context=256, count=4, part="text for calibration")
    test = windows(corpus.held_out, tokenizer, context=128, count=2, part="held-out text")
    dense = perplexity(model, test)
    sparsify(model, tau=0.9, config=SparsifyConfig(expert_size=64), calibration=fit, progress=False)
    routed = perplexity(model, test)
    set_threshold_shares(model, fit, inputs=0.35, neurons=0.5, progress=False)
    # In float64: what rounding leaves out or not in one layer moves many more over their thresholds in the next ones.
    model.double()
    masked, masks = masked_by_hooks(model)
    with record_sparsity(model) as record, register_routing_hook(model, lambda r: see(masks, r)):
        found = perplexity(model, test)
    assert found == pytest.approx(perplexity(model, test), rel=1e-4), "the same at once and in parts"
    assert found == pytest.approx(perplexity(masked, test), rel=1e-4)
    assert not any(masks.values()), "every mask was used"
    assert dense < routed < found
    shares = record.shares
    assert shares.inputs == pytest.approx(0.65, abs=0.05) and shares.neurons == pytest.approx(0.5, abs=0.07)
    expected = shares.experts * (2 * shares.inputs + shares.neurons) / 3 + 24 / (3 * 1536)
    assert shares.bytes == pytest.approx(expected, abs=0.01)


def see(masks: dict[str, list[Tensor]], routing: Routing) -> None:
    masks[routing.name].append(routing.mask_TE)
