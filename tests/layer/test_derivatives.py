"""Derivatives of a sparse model beyond one gradient: second ones, and the transforms of torch.func.

The function that is differentiated has its mask fixed: what is chosen does not change with an infinitesimal step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparse_layers, sparsify
from torch_prunepath.activations import ACTIVATIONS, activate
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.ops import operators as ops
from torch_prunepath.ops.experts import weigh, zero_inactive
from torch_prunepath.ops.transforms import is_transformed
from torch_prunepath.rms import inverse_rms
from torch_prunepath.select import mask_from_scores, sigmoid_weights

CONFIG = {"expert_size": 8, "partition": "random", "router": "centroid", "budget": "uniform"}
SETTINGS = [{}, {"gate": "sigmoid"}, {"gate": "sigmoid", "router_norm": True, "shared_experts": 1}]
FFNS = ["functional_silu", "fused_up_first", "plain_square", "sequential"]
Function = Callable[[Tensor], Tensor]


def sparse_ffn(name: str, settings: dict[str, Any]) -> tuple[Any, Tensor]:
    """One sparse FFN of 16 inputs, in float64, and five tokens."""
    model, inputs = HAND_WRITTEN[name]()
    data = inputs if "shared_experts" in settings else None  # which say which neurons are shared
    sparsify(model, tau=0.5, config=SparsifyConfig(**CONFIG, **settings), calibration=data, progress=False)
    torch.manual_seed(0)
    layer = next(iter(sparse_layers(model).values())).eval().double()
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer, torch.randn(5, 16, dtype=torch.float64)


def masked(layer: Any) -> Function:
    """What the layer computes, in torch's operators alone: the dense FFN between a mask and weights."""
    view, experts = FFNView.of_owner(layer, layer.ffn), layer.experts

    def run(x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        read = x_TD.float() * inverse_rms(x_TD) if layer.router_norm else x_TD.float()
        bias = None if layer.router.bias is None else layer.router.bias.float()
        scores_TE = nn.functional.linear(read, layer.router.weight.float(), bias)
        mask_TE = mask_from_scores(scores_TE.detach(), layer.tau, experts.rule, experts.shared)
        h_TF = activate(*view.up_weights.project(x_TD), layer.ffn.activation)
        if experts.gate == "sigmoid":
            weights_TE = sigmoid_weights(scores_TE, experts.gate_offset, experts.shared)
            h_TF = weigh(h_TF, weights_TE, experts.expert_size)
        h_TF = zero_inactive(h_TF, mask_TE, experts.expert_size)
        return nn.functional.linear(h_TF, view.down_FD.t(), view.down_bias_D).view(x.shape)

    return run


def twice(run: Function, x: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the squared length of a gradient: a product with the Hessian, for tokens and all parameters."""
    x = x.clone().requires_grad_()
    wanted = [x, *parameters]
    first = torch.autograd.grad(run(x).square().sum(), wanted, create_graph=True, allow_unused=True)
    length = sum(part.square().sum() for part in first if part is not None)
    assert isinstance(length, Tensor)
    return list(torch.autograd.grad(length, wanted, allow_unused=True))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FFNS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_second_derivatives_are_those_of_the_masked_function(name: str, settings: dict, training: bool) -> None:
    layer, x = sparse_ffn(name, settings)
    layer.train(training)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = list(layer.parameters())
    found, expected = twice(layer, x, parameters), twice(masked(layer), x, parameters)
    learns = settings.get("gate") == "sigmoid"
    assert sum(part is not None for part in found) >= len(parameters) + 1 - (0 if learns else 2)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # scores are float32
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


@pytest.mark.parametrize("name", FFNS)
def test_gradgradcheck_of_a_layer(name: str) -> None:
    layer, x = sparse_ffn(name, {})
    x = x[:3].requires_grad_()
    assert torch.autograd.gradcheck(layer, [x])
    assert torch.autograd.gradgradcheck(layer, [x])


@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradgradcheck_of_expert_up(activation: str, gated: bool) -> None:
    if activation == "none" and gated:
        pytest.skip("a gate needs an activation")
    T, D, F, S = 3, 4, 11, 3
    torch.manual_seed(0)
    shapes = [(T, D), (F, D), (F,), *([(F, D), (F,)] if gated else [])]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.rand(T, 4) < 0.6
    rest = [] if gated else [None, None]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return ops.expert_up(x, mask, *weights, *rest, activation, S)

    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("weighed", [False, True])
def test_gradgradcheck_of_expert_down(weighed: bool) -> None:
    T, D, F, S = 3, 4, 11, 3
    torch.manual_seed(0)
    shapes = [(T, F), (F, D), (D,), *([(T, 4)] if weighed else [])]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.rand(T, 4) < 0.6

    def run(h: Tensor, down: Tensor, bias: Tensor, weights: Tensor | None = None) -> Tensor:
        return ops.expert_down(h, mask, weights, down, bias, S)

    assert torch.autograd.gradgradcheck(run, leaves)


def test_third_derivatives() -> None:
    layer, x = sparse_ffn("functional_silu", {})
    run, expected = (jacrev(jacrev(grad(lambda v, f=f: f(v).square().sum()))) for f in (layer, masked(layer)))
    torch.testing.assert_close(run(x[0]), expected(x[0]), rtol=1e-6, atol=1e-6)
    for f in (layer, masked(layer)):
        leaf = x.clone().requires_grad_()
        thing = f(leaf).square().sum()
        for _ in range(3):
            (thing,) = torch.autograd.grad(thing.square().sum(), leaf, create_graph=True)
        if f is layer:
            found = thing
    torch.testing.assert_close(found, thing, rtol=1e-6, atol=1e-6)


TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, x: grad(lambda v: f(v).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(x)),
    "jvp": lambda f, x: jvp(f, (x,), (torch.cos(x),)),
    "jacrev": lambda f, x: jacrev(lambda v: f(v[None])[0])(x[0]),
    "hessian": lambda f, x: hessian(lambda v: f(v[None]).square().sum())(x[0]),
    "vmap": lambda f, x: vmap(f)(x),
    "vmap of rows": lambda f, x: vmap(f, in_dims=1, out_dims=1)(torch.stack([x, 2 * x], 1)),
    "gradients of each token": lambda f, x: vmap(grad(lambda v: f(v[None]).square().sum()))(x),
    "forward over reverse": lambda f, x: jvp(grad(lambda v: f(v).square().sum()), (x,), (torch.cos(x),)),
    "reverse over reverse": lambda f, x: vjp(grad(lambda v: f(v).square().sum()), x)[1](torch.cos(x)),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FFNS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_those_of_the_masked_function(
    transform: str, name: str, settings: dict, gradients: bool
) -> None:
    if transform == "hessian" and not gradients:
        pytest.skip("torch's own silu has no such derivative under no_grad")
    layer, x = sparse_ffn(name, settings)
    with torch.set_grad_enabled(gradients):
        found, expected = (TRANSFORMS[transform](f, x) for f in (layer, masked(layer)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_without_torch_func(gradients: bool) -> None:
    layer, x = sparse_ffn("functional_silu", {"gate": "sigmoid"})
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.cos(x)))).tangent for f in (layer, masked(layer))
        ]
    torch.testing.assert_close(*tangents, rtol=1e-5, atol=1e-5)


# --- whole models -----------------------------------------------------------------------------------------------------

MODELS = ["llama", "bert", "gpt2", "opt"]


def whole(name: str, tau: float | None) -> tuple[Any, dict[str, Tensor]]:
    """A model whose attention can be differentiated twice: torch's fused one cannot. ``tau=None``: dense."""
    model, inputs = ARCHITECTURES[name]()
    if tau is not None:
        sparsify(model, tau=tau, config=SparsifyConfig(**CONFIG), progress=False)
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    return model.eval(), inputs


def loss_of(model: Any) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], **inputs: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (), inputs)[0]
        return logits.log_softmax(-1).square().mean()

    return loss


def detached(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def direction(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(v.shape, generator=generator) / v.numel() ** 0.5 for k, v in parameters.items()}


def by_double_backward(model: Any, inputs: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Hessian of the loss times a direction."""
    parameters = dict(model.named_parameters())
    first = torch.autograd.grad(
        loss_of(model)({}, **inputs), list(parameters.values()), create_graph=True, allow_unused=True
    )
    product = sum((g * v[k]).sum() for k, g in zip(parameters, first, strict=True) if g is not None)
    assert isinstance(product, Tensor)
    second = torch.autograd.grad(product, list(parameters.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(parameters.items(), second, strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_hessian_products_of_whole_models(name: str) -> None:
    model, inputs = whole(name, 0.5)
    parameters = detached(model)
    v = direction(parameters)
    found = by_double_backward(model, inputs, v)
    _, expected = jvp(grad(lambda p: loss_of(model)(p, **inputs)), (parameters,), (v,))
    moved = [key for key in found if "mlp" in key or "fc1" in key or "intermediate" in key]
    assert moved and any(bool(found[key].abs().max() > 0) for key in moved)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_at_tau_1_they_are_the_dense_models(name: str) -> None:
    dense, inputs = whole(name, None)
    model, _ = whole(name, 1.0)
    for transform in (grad, jacrev):
        one, other = (transform(lambda p, m=m: loss_of(m)(p, **inputs))(detached(m)) for m in (model, dense))
        for key in other:
            if "mlp" not in key and "fc" not in key and "dense" not in key:  # neurons change places
                torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5, msg=key)
    v = direction({k: p for k, p in detached(dense).items() if "norm" in k.lower() or "ln_" in k})
    for m in (model, dense):
        rest = {k: p for k, p in detached(m).items() if k not in v}
        there = {k: detached(m)[k] for k in v}
        _, product = jvp(grad(lambda p, r=rest, m=m: loss_of(m)({**r, **p}, **inputs)), (there,), (v,))
        if m is model:
            found = product
    torch.testing.assert_close(found, product, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "opt"])  # a dense GPT-2 asks for its mask's values under vmap
def test_gradients_of_each_sample(name: str) -> None:
    model, inputs = whole(name, 0.5)
    parameters, ids = detached(model), inputs["input_ids"]
    one = grad(lambda p, row: loss_of(model)(p, input_ids=row[None]))
    found = vmap(one, in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        for key, value in one(parameters, row).items():
            torch.testing.assert_close(found[key][i], value, rtol=1e-3, atol=1e-5, msg=key)


@torch.no_grad()
def test_an_ensemble_of_weights() -> None:
    model, inputs = whole("llama", 0.5)
    parameters = detached(model)
    both = {key: torch.stack([value, 1.1 * value]) for key, value in parameters.items()}
    found = vmap(lambda p: functional_call(model, p, (), inputs)[0])(both)
    for i, factor in enumerate((1.0, 1.1)):
        expected = functional_call(model, {k: factor * p for k, p in parameters.items()}, (), inputs)[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled_inside", [True, False])
def test_transforms_under_torch_compile(compiled_inside: bool) -> None:
    torch._dynamo.reset()
    layer, x = sparse_ffn("functional_silu", {})
    expected = grad(lambda v: masked(layer)(v).square().sum())(x)
    if compiled_inside:
        run = torch.compile(layer, backend="eager")
        found = grad(lambda v: run(v).square().sum())(x)
    else:
        found = torch.compile(grad(lambda v: layer(v).square().sum()), backend="eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # and the operators are back where nothing is transformed
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_nothing_is_transformed_outside() -> None:
    assert not is_transformed()
    seen = []
    vmap(lambda v: seen.append(is_transformed()) or v)(torch.zeros(2))
    assert seen == [True] and not is_transformed()


def test_what_a_gradient_penalty_trains() -> None:
    """A step on the length of the input's gradient, in evaluation mode: the loss falls."""
    model, inputs = whole("llama", 0.5)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lengths = []
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(inputs_embeds=embedded).logits
        (slope,) = torch.autograd.grad(logits.log_softmax(-1).square().mean(), embedded, create_graph=True)
        penalty = slope.square().sum()
        penalty.backward()
        optimizer.step()
        lengths.append(float(penalty.detach()))
    assert lengths[2] < lengths[0]


def test_records_are_refused_inside_of_transforms() -> None:
    model, inputs = whole("llama", 0.5)
    set_tau(model, 0.5)
    with record_sparsity(model), pytest.raises(ValueError, match="cannot count inside of a transform"):
        grad(lambda p: loss_of(model)(p, **inputs))(detached(model))
