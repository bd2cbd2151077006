"""Reordered copies of weights: the same numbers, never those of a weight that has changed, and no trace in a model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, densify, sparsify
from torch_prunepath.layer import SparseFFN
from torch_prunepath.ops.cpu import packs as cpu_packs
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.select import mask_from_scores

needs_bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 products on this processor",
)
D, F, S, T = 72, 203, 16, 20


@pytest.fixture(autouse=True)
def _small_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packs, "SMALL_BYTES", 0)


class MLP(nn.Module):
    """As Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, F), nn.Linear(D, F)
        self.down_proj, self.act_fn = nn.Linear(F, D), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def sparse_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(MLP()).bfloat16().eval()
    config = SparsifyConfig(expert_size=S, partition="contiguous", router="centroid", budget="uniform")
    sparsify(model, tau=0.6, config=config, progress=False)
    assert layer_of(model).packs is None, "copies are for those who ask for them"
    layer_of(model).packs = Packs()
    return model


def tokens(n: int = T) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n)).bfloat16()


def layer_of(model: nn.Module) -> SparseFFN:
    return next(module for module in model.modules() if isinstance(module, SparseFFN))


def packs_of(model: nn.Module) -> Packs:
    packs = layer_of(model).packs
    assert packs is not None
    return packs


def run(model: nn.Module, times: int = 1, n: int = T) -> Tensor:
    with torch.no_grad():
        for _ in range(times):
            y: Tensor = model(tokens(n))
    return y


def expected(model: nn.Module, n: int = T) -> Tensor:
    """In float32, from the weights as they are now."""
    layer, x = layer_of(model), tokens(n).float()
    up, gate, down = (getattr(layer, f"{name}_proj") for name in ("up", "gate", "down"))
    scores = x @ layer.router.weight.float().t()
    if layer.router.bias is not None:
        scores = scores + layer.router.bias.float()
    mask = mask_from_scores(scores, layer.tau, "reach").repeat_interleave(S, dim=1)[:, :F]
    h = nn.functional.silu(x @ gate.weight.float().t() + gate.bias.float()) * (
        x @ up.weight.float().t() + up.bias.float()
    )
    return ((h * mask) @ down.weight.float().t() + down.bias.float()).detach()


def assert_right(model: nn.Module, found: Tensor, n: int = T) -> None:
    want = expected(model, n)
    assert float((found.float() - want).norm() / want.norm()) < 2e-2


@needs_bf16
@pytest.mark.parametrize("every", [False, True], ids=["down", "every"])
@pytest.mark.parametrize("n", [2, 5, 17, 64])
def test_copies_give_the_formula(n: int, every: bool) -> None:
    model = sparse_model()
    layer_of(model).packs = packs = Packs(every)
    assert_right(model, run(model, 1, n), n)
    assert packs.nbytes == 0, "the first call makes none"
    assert_right(model, run(model, 2, n), n)
    assert packs.nbytes >= (3 if every else 1) * 2 * D * F


@needs_bf16
def test_no_copies_for_single_tokens_other_dtypes_and_where_switched_off() -> None:
    model = sparse_model()
    run(model, 3, 1)
    assert packs_of(model).nbytes == 0
    wide = sparse_model().float()
    with torch.no_grad():
        for _ in range(3):
            wide(tokens().float())
    assert packs_of(wide).nbytes == 0
    run(model, 2)
    layer_of(model).packs = None
    assert_right(model, run(model, 3))


def _in_place(layer: SparseFFN) -> None:
    with torch.no_grad():
        layer.down_proj.weight.mul_(-2)  # type: ignore[operator, union-attr]


def _through_data(layer: SparseFFN) -> None:
    layer.down_proj.weight.data += 0.5  # type: ignore[operator, union-attr]


def _new_data(layer: SparseFFN) -> None:
    weight = layer.down_proj.weight
    weight.data = -weight.data  # type: ignore[operator, union-attr]


def _new_parameter(layer: SparseFFN) -> None:
    layer.down_proj.weight = nn.Parameter(-layer.down_proj.weight.detach())  # type: ignore[operator, union-attr]


def _router(layer: SparseFFN) -> None:
    with torch.no_grad():
        layer.router.weight.neg_()


def _loaded(layer: SparseFFN) -> None:
    layer.load_state_dict({name: -t if t.is_floating_point() else t for name, t in layer.state_dict().items()})


def _up_too(layer: SparseFFN) -> None:
    with torch.no_grad():
        layer.up_proj.weight.mul_(-2)  # type: ignore[operator, union-attr]
        layer.gate_proj.weight.mul_(-2)  # type: ignore[operator, union-attr]


@needs_bf16
@pytest.mark.parametrize(
    "change", [_in_place, _through_data, _new_data, _new_parameter, _router, _loaded, _up_too], ids=lambda f: f.__name__
)
def test_a_changed_weight_is_copied_anew(change: Callable[[SparseFFN], None]) -> None:
    model = sparse_model()
    layer_of(model).packs = Packs(every=True)
    before = run(model, 3)
    change(layer_of(model))
    after = run(model)
    assert not torch.allclose(before, after, rtol=0.1, atol=0.1)
    assert_right(model, after)


@needs_bf16
def test_a_changed_weight_of_single_neurons_needs_clear() -> None:
    model = sparse_model()
    run(model, 3)
    weight = layer_of(model).down_proj.weight
    with torch.no_grad():
        weight[3, 5] = 100.0  # type: ignore[index, operator]
    assert_right(model, run(model))  # a counted change is seen however small
    weight.data[4, 6] = 100.0  # type: ignore[index, union-attr]
    packs_of(model).clear()
    assert packs_of(model).nbytes == 0
    assert_right(model, run(model))


@needs_bf16
def test_moving_a_model_drops_its_copies() -> None:
    model = sparse_model()
    run(model, 2)
    assert packs_of(model).nbytes > 0
    model.to(torch.float32)
    assert packs_of(model).nbytes == 0
    model.bfloat16()
    assert_right(model, run(model, 3))


@needs_bf16
def test_copies_of_a_model_start_without() -> None:
    model = sparse_model()
    layer_of(model).packs = Packs(every=True)
    y = run(model, 3)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert packs_of(other).nbytes == 0 and packs_of(other).every
        assert torch.equal(run(other, 3), y)
        _in_place(layer_of(other))
        assert_right(other, run(other))
    assert torch.equal(run(model), y)


@needs_bf16
def test_a_model_shows_no_trace_of_copies() -> None:
    model = sparse_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run(model, 3)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer = layer_of(model)
    densify(model)
    assert "packs" not in vars(layer) and type(layer) is MLP


@needs_bf16
def test_weights_whose_changes_are_not_counted_have_no_copy() -> None:
    with torch.inference_mode():
        weight = torch.randn(D, F).bfloat16()
    assert Packs().of("down", weight) is None
    nan = torch.full((D, F), float("nan")).bfloat16()
    assert Packs().of("down", nan) is None
    assert Packs().of("down", torch.randn(D, 2 * F).bfloat16()[:, :F]) is None


def test_the_switch_of_onednn_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model()
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert_right(model, run(model, 3))
    finally:
        torch.backends.mkldnn.enabled = before
    assert packs_of(model).nbytes == 0
