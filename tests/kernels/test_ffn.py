"""Whole sparse FFNs and their halves in Triton against float64, at odd sizes, in poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.layer.reference import router_scores_reference, select_reference
from torch_prunepath.ops import operators as ops
from torch_prunepath.ops.sparse_ffn import arguments
from torch_prunepath.weights import FFNWeights, Selector, UpWeights

ffn = pytest.importorskip("torch_prunepath.csrc_triton.ffn")

BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
LAYERS = [  # D, F, S, gated, biases, activation
    pytest.param((50, 101, 12, False, True, "gelu"), id="plain-odd"),
    pytest.param((64, 96, 8, True, False, "silu"), id="gated"),
    pytest.param((33, 70, 32, True, True, "quick_gelu"), id="gated-short-last-expert"),
    pytest.param((16, 130, 128, False, False, "relu2"), id="two-experts"),
    pytest.param((24, 40, 40, False, True, "relu"), id="one-expert"),
    pytest.param((40, 60, 3, True, False, "gelu_tanh"), id="odd-experts"),
]
TOKENS = [1, 2, 5, 16, 19]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What ``torch.empty`` returns holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """A random FFN in row layout and its input."""

    def __init__(self, tokens: int, layer: tuple, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        D, F, self.S, gated, bias, self.activation = layer
        self.E = -(-F // self.S)
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype)

        self.x = random(tokens, D)
        self.router = [random(self.E, D, scale=3 * D**-0.5), random(self.E) if bias else None]
        self.up = [random(F, D, scale=D**-0.5), random(F) if bias else None]
        self.gate = [random(F, D, scale=D**-0.5), random(F) if bias else None] if gated else [None, None]
        self.down = [random(F, D, scale=F**-0.5), random(D) if bias else None]

    def args(
        self, tau: float, rule: str = "reach", offset: float | None = None, router_norm: bool = False, shared: int = 0
    ) -> tuple:
        selector = Selector(*self.router, torch.tensor(tau, device=self.x.device), rule, offset, router_norm, shared)  # type: ignore[arg-type]
        return self.x, selector, FFNWeights(*self.up, *self.gate, *self.down), self.activation, self.S

    def mask(self, tau: float, rule: str = "reach") -> Tensor:
        return ops.select_experts._init_fn(self.scores(), torch.tensor(tau, device=self.x.device), rule)

    def scores(self) -> Tensor:
        return torch.nn.functional.linear(*[None if t is None else t.double() for t in (self.x, *self.router)]).float()


def reference(args: tuple) -> Tensor:
    """The operators' default implementations in float64, on the same rounded inputs."""
    wide = [a.double() if isinstance(a, Tensor) and a.dim() else a for a in arguments(*args)]
    x, router, router_bias, tau, rule, offset, up, up_b, gate, gate_b, down, down_b, activation, size, *router_how = (
        wide
    )
    router_norm, shared = router_how
    scores = router_scores_reference(x, router, router_bias, router_norm).float()
    mask = torch.tensor([select_reference(row, float(tau), rule, shared) for row in scores.tolist()], device=x.device)
    gates = None if offset is None else torch.sigmoid(scores.double() + offset)
    if gates is not None:
        gates[:, :shared] = 1.0
    h = ops.expert_up._init_fn(x, mask, up, up_b, gate, gate_b, activation, size)
    return ops.expert_down._init_fn(h, mask, gates, down, down_b, size)


def assert_near(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < BOUND[found.dtype], float(error)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS)
def test_ffn(device: str, layer: tuple, tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, layer, dtype, device)
    for tau, rule, offset in ((0.6, "reach", None), (0.8, "below", 0.3)):
        args = problem.args(tau, rule, offset)
        found = ffn.sparse_ffn(*args)
        assert found.dtype == dtype
        assert_near(found, reference(args))
        assert torch.equal(found, ffn.sparse_ffn(*args)), "not reproducible"


WIDE = pytest.param((643, 70, 8, True, True, "silu"), id="every-split")
"""The router's columns are split among several programs, the last of which has the fewest."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 19])
@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[2], WIDE])
def test_normalised_router(
    device: str, layer: tuple, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(tokens, layer, dtype, device)
    # Sizes that change what is selected; of the first token the epsilon is a part.
    problem.x *= torch.logspace(-3, 1, tokens, device=device).unsqueeze(1).to(dtype)
    for tau, rule, offset, most in ((0.6, "reach", None, ffn.RANK_PAIRS), (0.8, "below", 0.3, 0)):
        monkeypatch.setattr(ffn, "RANK_PAIRS", most)  # with 0, several tokens search
        args = problem.args(tau, rule, offset, router_norm=True)
        assert_near(ffn.sparse_ffn(*args), reference(args))


@pytest.mark.parametrize("router_norm", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("tokens", [1, 5, 19])
@pytest.mark.parametrize(("layer", "shared"), [(1, 1), (1, 11), (2, 2)])
def test_shared_experts(
    device: str, layer: int, shared: int, tokens: int, router_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(tokens, LAYERS[layer].values[0], torch.float32, device)
    for tau, rule, offset, most in ((0.3, "reach", 0.3, ffn.RANK_PAIRS), (0.3, "below", None, 0)):
        monkeypatch.setattr(ffn, "RANK_PAIRS", most)  # with 0, several tokens search
        for level in (tau, 1.0):
            args = problem.args(level, rule, offset, router_norm, shared)
            assert_near(ffn.sparse_ffn(*args), reference(args))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nan_in_a_normalised_token_shows_in_that_token(device: str, tokens: int) -> None:
    problem = Problem(tokens, (50, 101, 12, True, True, "silu"), torch.float32, device)
    expected = reference(problem.args(0.4, router_norm=True))
    problem.x[tokens - 1, 7] = float("nan")
    found = ffn.sparse_ffn(*problem.args(0.4, router_norm=True))
    assert found[-1].isnan().all()
    if tokens > 1:
        assert_near(found[:-1], expected[:-1])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS[:3])
def test_every_expert_at_tau_1(device: str, layer: tuple, tokens: int) -> None:
    problem = Problem(tokens, layer, torch.float32, device)
    args = problem.args(1.0)
    wide = [a.double() if isinstance(a, Tensor) and a.dim() else a for a in arguments(*args)]
    x, _, _, _, _, _, up, up_b, gate, gate_b, down, down_b, activation, *_ = wide
    act, linear = ACTIVATIONS[activation], torch.nn.functional.linear
    h = act(linear(x, up, up_b)) if gate is None else act(linear(x, gate, gate_b)) * linear(x, up, up_b)
    assert_near(ffn.sparse_ffn(*args), linear(h, down.t(), down_b))


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_inactive_rows_are_not_read(device: str, tokens: int) -> None:
    problem = Problem(tokens, (50, 101, 12, True, True, "silu"), torch.float32, device)
    expected = reference(problem.args(0.2))
    unused = ops.expand_experts(~problem.mask(0.2).any(0, keepdim=True), problem.S, 101)[0]
    assert unused.any()
    for tensor in (*problem.up, *problem.gate, problem.down[0]):
        tensor[unused] = float("nan")
    assert_near(ffn.sparse_ffn(*problem.args(0.2)), expected)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nan_in_a_token_shows_in_that_token(device: str, tokens: int) -> None:
    problem = Problem(tokens, (50, 101, 12, True, False, "silu"), torch.float32, device)
    expected = reference(problem.args(0.4))
    problem.x[tokens - 1, 7] = float("nan")
    found = ffn.sparse_ffn(*problem.args(0.4))
    assert found[-1].isnan().all()
    if tokens > 1:
        assert_near(found[:-1], expected[:-1])


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_any_strides(device: str, tokens: int) -> None:
    problem = Problem(tokens, (50, 101, 12, True, True, "silu"), torch.float32, device)
    expected = reference(problem.args(0.5))
    for weights in (problem.router, problem.up, problem.gate, problem.down):
        weights[0] = weights[0].t().contiguous().t()
    problem.x = torch.stack([problem.x, problem.x], dim=-1)[..., 0]
    assert_near(ffn.sparse_ffn(*problem.args(0.5)), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_many_small_experts(device: str, tokens: int) -> None:
    problem = Problem(tokens, (16, 4096 * 8 - 3, 8, False, False, "silu"), torch.float32, device)
    assert_near(ffn.sparse_ffn(*problem.args(0.05)), reference(problem.args(0.05)))


def test_no_token(device: str) -> None:
    problem = Problem(0, (50, 101, 12, True, True, "silu"), torch.float32, device)
    assert ffn.sparse_ffn(*problem.args(0.5)).shape == (0, 50)
    mask = torch.ones(0, problem.E, dtype=torch.bool, device=device)
    h = ffn.expert_up(problem.x, mask, UpWeights(*problem.up, *problem.gate), "silu", problem.S)
    assert h.shape == (0, 101)
    assert ffn.expert_down(h, mask, None, *problem.down, problem.S).shape == (0, 50)
    assert ffn.select_experts(torch.empty(0, 9, device=device), torch.tensor(0.5, device=device), "reach").shape == (
        0,
        9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS)
def test_halves(device: str, layer: tuple, tokens: int, dtype: torch.dtype) -> None:
    """The two operators by themselves, as models that call fc1 and fc2 apart need them."""
    problem = Problem(tokens, layer, dtype, device)
    mask, wide = problem.mask(0.5), [None if t is None else t.double() for t in (*problem.up, *problem.gate)]
    for activation in (problem.activation, "none"):
        if activation == "none" and problem.gate[0] is not None:
            continue
        found = ffn.expert_up(problem.x, mask, UpWeights(*problem.up, *problem.gate), activation, problem.S)
        expected = ops.expert_up._init_fn(problem.x.double(), mask, *wide, activation, problem.S)
        assert_near(found, expected)
        inactive = ~ops.expand_experts(mask, problem.S, found.shape[1])
        assert not found[inactive].any(), "inactive neurons must be exactly 0"
    h = found.masked_fill(inactive, float("inf"))  # must not be read
    down = [None if t is None else t.double() for t in problem.down]
    for gates in (None, torch.rand(mask.shape, device=device)):
        expected = ops.expert_down._init_fn(h.double(), mask, gates, *down, problem.S)
        assert_near(ffn.expert_down(h, mask, gates, *problem.down, problem.S), expected)
        assert h[inactive].isinf().all(), "the input must stay as it is"


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_router_scores(device: str, tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, LAYERS[0].values[0], dtype, device)
    found = ffn.router_scores(problem.x, *problem.router)
    torch.testing.assert_close(found, problem.scores(), rtol=1e-5, atol=1e-5)
    found = ffn.router_scores(3 * problem.x, *problem.router, True)
    expected = router_scores_reference(3 * problem.x, *problem.router, True)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 19])
@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[2]])
def test_weights_with_ordinary_strides(device: str, layer: tuple, tokens: int) -> None:
    """``down`` as ``[D, F]`` in memory, as :func:`torch_prunepath.contiguous` stores it; and all others transposed."""
    problem = Problem(tokens, layer, torch.float32, device)
    expected = reference(problem.args(0.6))
    problem.down[0] = problem.down[0].t().contiguous().t()
    assert_near(ffn.sparse_ffn(*problem.args(0.6)), expected)
    for part in (problem.up, problem.gate):
        part[0] = None if part[0] is None else part[0].t().contiguous().t()
    assert_near(ffn.sparse_ffn(*problem.args(0.6)), expected)
