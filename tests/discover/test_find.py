"""Every FFN of every supported architecture is found, as what it is; what is none is refused with a reason."""

from __future__ import annotations

import copy
import random
import time
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, HAND_WRITTEN, NOTHING_TO_FIND
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_prunepath.config import FFNSpec
from torch_prunepath.discover import discover, find_ffns
from torch_prunepath.layer.ffn import FFNView, bias_of


class Expected(NamedTuple):
    activation: str
    widths: tuple[int, ...] = (37, 37)
    form: str = "gated"
    split: bool = False
    hidden_size: int = 32
    dropouts: tuple[str | None, str | None] = (None, None)


LLAMA = Expected("silu")
GEMMA = Expected("gelu_tanh")
BERT = Expected("gelu", form="plain", split=True)
OPT = Expected("relu", form="plain", split=True)
FALCON = Expected("gelu", (40, 40), "plain")
STARCODER = Expected("gelu_tanh", form="plain")

EXPECTED = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "smollm3", "stablelm", "olmo2", "granite"], LLAMA),
    **dict.fromkeys(["gemma", "gemma2", "gemma3"], GEMMA),
    "phi": Expected("gelu_tanh", form="plain"),
    "phi3": Expected("silu", form="gate_up"),
    "gpt2": Expected("gelu_tanh", form="plain", dropouts=(None, "dropout")),
    "gpt_neox": Expected("gelu", form="plain"),
    "gptj": Expected("gelu_tanh", (41, 41), "plain", dropouts=(None, "dropout")),
    "falcon": FALCON,
    "falcon_new": FALCON,
    "bloom": Expected("gelu_tanh", (80, 80), "plain", split=True, hidden_size=20),
    "opt": OPT,
    "opt_norm_after": OPT,
    "starcoder2": STARCODER,
    "starcoder2_dropout": STARCODER._replace(split=True),
    "mpt": Expected("gelu", (80, 80), "plain", split=True, hidden_size=20),
    "t5": Expected("relu", (37,) * 4, "plain", dropouts=("dropout", None)),
    "t5_gated": Expected("gelu_tanh", (37,) * 4, dropouts=("dropout", None)),
    "bert": BERT,
    "roberta": BERT,
    "distilbert": Expected("gelu", form="plain", dropouts=(None, "dropout")),
    "modernbert": Expected("gelu", form="gate_up", dropouts=("drop", None)),
    "albert": BERT._replace(widths=(37,), activation="gelu_tanh"),
    "vit": Expected("gelu", form="plain"),
    "whisper": BERT._replace(widths=(37, 37, 41, 41)),
    "sequential": Expected("gelu", form="plain", hidden_size=16, dropouts=("2", "4")),
    "functional_silu": Expected("silu", (37, 24), hidden_size=16),
    "gate_second": Expected("silu", (37, 24), hidden_size=16),
    "gated_square": Expected("silu", (16, 16), hidden_size=16),
    "fused_up_first": Expected("gelu_tanh", (21, 16), "up_gate", hidden_size=16, dropouts=("drop", "drop")),
    "bottleneck": Expected("relu2", (5, 3), "plain", hidden_size=16),
    "plain_square": Expected("quick_gelu", (16,), "plain", hidden_size=16),
}
BUILDERS = {**ARCHITECTURES, **HAND_WRITTEN}
every_architecture = pytest.mark.parametrize("name", EXPECTED)


@cache
def built(name: str) -> tuple[nn.Module, dict[str, Any], list[FFNSpec]]:
    """The model in float64, with inputs and what is found; tests leave it as it is."""
    model, inputs = BUILDERS[name]()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double(), inputs, find_ffns(model)


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def form_of(spec: FFNSpec) -> str:
    return spec.fused or ("gated" if spec.gated else "plain")


def test_every_architecture_is_expected() -> None:
    assert set(EXPECTED) == set(BUILDERS)


@every_architecture
def test_found_as_what_it_is(name: str) -> None:
    model, _, specs = built(name)
    expected = EXPECTED[name]
    assert tuple(spec.ffn_size for spec in specs) == expected.widths
    for spec in specs:
        assert (spec.activation, form_of(spec), spec.split) == (expected.activation, expected.form, expected.split)
        assert (spec.hidden_size, (spec.hidden_dropout, spec.output_dropout)) == (
            expected.hidden_size,
            expected.dropouts,
        )
        view = FFNView(model, spec)
        assert view.up_FD.shape == view.down_FD.shape == (spec.ffn_size, spec.hidden_size)
        assert (view.gate_FD is not None) == spec.gated
    order = [module_name for module_name, _ in model.named_modules()]
    places = [order.index(spec.name) for spec in specs]
    assert places == sorted(set(places)), "in module order, each once"


@every_architecture
def test_view_computes_what_the_model_computes(name: str) -> None:
    """``view.hidden(x) @ down`` on the x of a real forward pass is what the model's own modules return."""
    model, inputs, specs = built(name)
    views = [FFNView(model, spec) for spec in specs]
    ends = [(view.up, view.down) if view.spec.split else (view.owner, view.owner) for view in views]
    inputs_of: dict[nn.Module, Tensor] = {}
    outputs_of: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        inputs_of[module], outputs_of[module] = args[0].clone(), y.clone()  # Falcon adds to y in place

    handles = [module.register_forward_hook(keep) for pair in ends for module in pair]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    for view, (first, last) in zip(views, ends, strict=True):
        x, y = inputs_of[first], outputs_of[last]
        with torch.no_grad():
            got = view.hidden(x.reshape(-1, x.shape[-1])) @ view.down_FD
            got += 0 if view.down_bias_D is None else view.down_bias_D
        torch.testing.assert_close(got, y.reshape(got.shape), rtol=1e-10, atol=1e-9)  # Bloom rounds sqrt(2 / pi)


@every_architecture
def test_permuted_model_computes_the_same_and_can_be_restored(name: str) -> None:
    model, inputs, specs = built(name)
    dense = output(model, inputs)
    before = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(spec.ffn_size, generator=generator) for spec in specs]
    for spec, order in zip(specs, orders, strict=True):
        FFNView(model, spec).permute_(order)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k][0])]
    assert len(moved) >= 2 * sum(spec.ffn_size > 1 for spec in specs)
    torch.testing.assert_close(output(model, inputs), dense, rtol=1e-10, atol=1e-10)
    for spec, order in zip(specs, orders, strict=True):
        FFNView(model, spec).unpermute_(order)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].stride() == stride for k, (v, stride) in before.items())


VARIANTS = {
    "meta": lambda model: model.to("meta"),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "training": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@every_architecture
def test_same_in_any_state(name: str, variant: str) -> None:
    model = VARIANTS[variant](copy.deepcopy(built(name)[0]))
    assert find_ffns(model) == built(name)[2]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("mpt", "albert")])  # they cannot
def test_same_with_gradient_checkpointing(name: str) -> None:
    model = copy.deepcopy(built(name)[0]).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # type: ignore[operator]
    assert find_ffns(model) == built(name)[2]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that looking at it could change."""
    modules = {
        name: (
            type(m),
            m.training,
            [(k, id(v), repr(v) if isinstance(v, list | set) else "") for k, v in vars(m).items()],
        )
        for name, m in model.named_modules()
    }
    tensors = {n: (id(t), t._version) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return {"modules": modules, "tensors": tensors, "children": [id(m) for m in model.modules()]}


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_architecture
def test_looking_changes_nothing_and_calls_no_hook(name: str, training: bool) -> None:
    model = copy.deepcopy(built(name)[0]).train(training)
    called: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _args: called.append(m))
        module.register_forward_hook(lambda m, _args, _y: called.append(m))
    before, random_before, grad = state_of(model), random_states(), torch.is_grad_enabled()
    discover(model)
    assert state_of(model) == before
    assert random_states() == random_before and torch.is_grad_enabled() == grad
    assert not called


@pytest.mark.parametrize("name", NOTHING_TO_FIND)
def test_nothing_to_find(name: str) -> None:
    model, _ = NOTHING_TO_FIND[name]()
    with pytest.raises(
        ValueError, match=r"no feed-forward network .* was found in (Mamba|Mixtral)ForCausalLM"
    ) as error:
        find_ffns(model)
    expected = {
        "mamba": "backbone.layers.*.mixer: in_proj: a hidden value meets a value of other origin (conv1d) (2 times)",
        "mixtral": "model.layers.*.mlp.experts: holds stacked 3-D weights, as routed experts do",
    }
    assert expected[name] in str(error.value)
    assert {refusal.name.split(".")[-1] for refusal in discover(model).refused} <= {"mixer", "experts", "self_attn"}


def test_no_candidates_at_all() -> None:
    with pytest.raises(ValueError, match=r"no two linear layers have the sizes"):
        find_ffns(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 5)))


def test_activation_sparsity_inside_is_refused() -> None:
    config = hf.Gemma3nTextConfig(
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=37,
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        layer_types=["full_attention"] * 3,
        activation_sparsity_pattern=[0.95, 0.0, 0.0],
    )
    found = discover(hf.Gemma3nTextModel(config))
    assert [spec.name for spec in found.specs] == ["layers.1.mlp", "layers.2.mlp"]
    reasons = {refusal.name: refusal.reason for refusal in found.refused}
    assert "neither act(up) nor act(gate) * up" in reasons["layers.0.mlp"]


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor computed outside the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


def test_large_model_is_quick_and_needs_little_memory() -> None:
    """Qwen2-7B without weights."""
    config = hf.Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
    with torch.device("meta"):
        model = hf.Qwen2ForCausalLM(config)
    start = time.process_time()
    specs = find_ffns(model)
    seconds = time.process_time() - start
    assert [spec.name for spec in specs] == [f"model.layers.{i}.mlp" for i in range(28)]
    assert seconds < 2
    with LargestTensor() as largest:
        find_ffns(model)
    assert 0 < largest.bytes < 2**20, "less than a hundredth of one weight"


def test_biases_are_seen() -> None:
    model, _, specs = built("gpt2")
    view = FFNView(model, specs[0])
    assert all(bias is not None for bias in (view.up_bias_F, view.down_bias_D, bias_of(view.up)))
