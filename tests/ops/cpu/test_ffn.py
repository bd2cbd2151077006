"""The CPU path: the same numbers as the formula whatever is chosen, no row of an inactive expert read, none copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_prunepath import SparsifyConfig, sparsify
from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.config import Rule
from torch_prunepath.layer.reference import router_scores_reference, select_reference
from torch_prunepath.ops import operators as ops
from torch_prunepath.ops.cpu import dense as cpu_dense
from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.cpu import router as cpu_router
from torch_prunepath.ops.cpu import rows as cpu_rows
from torch_prunepath.ops.cpu import select as cpu_select
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.ops.experts import expand_experts, zero_inactive
from torch_prunepath.ops.sparse_ffn import arguments, sparse_ffn
from torch_prunepath.select import mask_from_scores
from torch_prunepath.weights import FFNWeights, Selector

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(params=["gathered", "dense", "mixed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces a choice that thresholds otherwise make."""
    monkeypatch.setattr(
        cpu_rows, "dots_pay", lambda pairs, tokens, rows, packed=False: tokens > 0 and request.param == "gathered"
    )
    monkeypatch.setattr(
        cpu_rows, "sums_pay", lambda pairs, tokens, rows, packed=False: tokens > 0 and request.param != "dense"
    )
    return request.param  # type: ignore[no-any-return]


class Layer:
    """A random FFN in float64, its router, and the arguments of ``sparse_ffn`` in another dtype."""

    def __init__(self, D: int, F: int, S: int, *, gated: bool = True, bias: bool = True, activation: str = "silu"):
        rng = torch.Generator().manual_seed(D * F + S)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64) / shape[-1] ** 0.5

        self.S, self.activation = S, activation
        self.up, self.down = random(F, D), random(F, D)
        self.gate = random(F, D) if gated else None
        biases = random(3, max(F, D)) if bias else None
        self.up_b = None if biases is None else biases[0, :F]
        self.gate_b = None if biases is None or not gated else biases[1, :F]
        self.down_b = None if biases is None else biases[2, :D]
        self.router, self.router_b = 4 * random(-(-F // S), D), random(-(-F // S)) if bias else None
        self.offset: float | None = None
        self.router_norm, self.shared = False, 0

    def weights(self, dtype: torch.dtype) -> FFNWeights:
        tensors = (self.up, self.up_b, self.gate, self.gate_b, self.down, self.down_b)
        return FFNWeights(*(None if t is None else t.to(dtype) for t in tensors))  # type: ignore[arg-type]

    def run(self, x: Tensor, tau: float, rule: str = "reach") -> Tensor:
        router = [None if t is None else t.to(x.dtype) for t in (self.router, self.router_b)]
        selector = Selector(*router, torch.tensor(tau), rule, self.offset, self.router_norm, self.shared)  # type: ignore[arg-type]
        return sparse_ffn(*arguments(x, selector, self.weights(x.dtype), self.activation, self.S))

    def run_ops(self, x: Tensor, mask: Tensor, gates: Tensor | None) -> Tensor:
        up, up_b, gate, gate_b, down, down_b = self.weights(x.dtype)
        h = ops.expert_up(x, mask, up, up_b, gate, gate_b, self.activation, self.S)  # type: ignore[arg-type]
        return ops.expert_down(h, mask, gates, down, down_b, self.S)  # type: ignore[arg-type]

    def formula(self, x: Tensor, mask: Tensor, gates: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Every neuron in float64, from weights rounded to dtype, then the mask."""
        up, up_b, gate, gate_b, down, down_b = (None if w is None else w.double() for w in self.weights(dtype))
        x = x.double()
        h = x @ up.t() + (0 if up_b is None else up_b)
        act = ACTIVATIONS[self.activation]
        h = act(h) if gate is None else act(x @ gate.t() + (0 if gate_b is None else gate_b)) * h
        factors = mask.double() if gates is None else mask * gates.double()
        h = h * torch.stack([factors[:, f // self.S] for f in range(h.shape[1])], dim=1)
        return h @ down + (0 if down_b is None else down_b)


def tokens(T: int, D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(T), dtype=torch.float64).to(dtype)


def random_mask(T: int, E: int, density: float) -> Tensor:
    return torch.rand(T, E, generator=torch.Generator().manual_seed(E)) < density


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, floor: float = 0.0) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < max(TOLERANCE[dtype], floor)


@DTYPES
@pytest.mark.parametrize("gated", [False, True], ids=["gate-one", "gates"])
@pytest.mark.parametrize("T", [1, 2, 5, 16, 17])
def test_operators_equal_the_formula(path: str, T: int, gated: bool, dtype: torch.dtype) -> None:
    layer = Layer(D=27, F=133, S=16)
    x, mask = tokens(T, 27, dtype), random_mask(T, 9, 0.4)
    gates = torch.rand(T, 9, generator=torch.Generator().manual_seed(1)) + 0.5 if gated else None
    assert_near(layer.run_ops(x, mask, gates), layer.formula(x, mask, gates, dtype), dtype)


@DTYPES
@pytest.mark.parametrize("offset", [None, 1.5], ids=["gate-one", "sigmoid"])
@pytest.mark.parametrize(
    ("rule", "router_norm", "shared"),
    [("reach", False, 0), ("below", False, 0), ("reach", True, 0), ("below", True, 3)],
)
@pytest.mark.parametrize("T", [1, 3, 20])
def test_whole_ffn_equals_the_formula(
    path: str, T: int, rule: str, router_norm: bool, shared: int, offset: float | None, dtype: torch.dtype
) -> None:
    layer = Layer(D=27, F=133, S=16)
    layer.offset, layer.router_norm, layer.shared = offset, router_norm, shared
    x = tokens(T, 27, dtype) * torch.logspace(-1, 0.5, T).unsqueeze(1).to(dtype)
    scores = router_scores_reference(x, layer.router.to(dtype), layer.router_b.to(dtype), router_norm)  # type: ignore[union-attr]
    gates = None if offset is None else torch.sigmoid(scores + offset)
    if gates is not None:
        gates[:, :shared] = 1.0
    for tau in (0.3, 0.9, 1.0):
        mask = torch.tensor([select_reference(s, tau, rule, shared) for s in scores.float().tolist()])
        # Scores, and so gates, are float32 whatever the weights are.
        assert_near(layer.run(x, tau, rule), layer.formula(x, mask, gates, dtype), dtype, floor=1e-6)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_activations_without_biases(path: str, gated: bool, activation: str) -> None:
    layer = Layer(D=7, F=37, S=8, gated=gated, bias=False, activation=activation)
    x, mask = tokens(3, 7), random_mask(3, 5, 0.4)
    assert_near(layer.run_ops(x, mask, None), layer.formula(x, mask, None, x.dtype), x.dtype)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 18),
    D=st.integers(1, 40),
    F=st.integers(1, 90),
    S=st.integers(1, 40),
    density=st.floats(0, 1),
    threads=st.integers(1, 3),
    block_bytes=st.sampled_from([1, 500, 1 << 20]),
    gates=st.booleans(),
)
def test_gathered_equals_the_default_implementation(
    T: int, D: int, F: int, S: int, density: float, threads: int, block_bytes: int, gates: bool
) -> None:
    """Any mask, an empty one included; any number of bags."""
    layer, x, mask = Layer(D, F, S), tokens(T, D), random_mask(T, -(-F // S), density)
    weights = layer.weights(x.dtype)
    weights_TE = torch.rand(mask.shape).double() if gates else None
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_rows, "SMALL_BYTES", 0)
        patch.setattr(cpu_rows, "CACHED_BYTES", block_bytes)
        torch.set_num_threads(threads)
        try:
            found = cpu.masked_ffn(x, mask, weights_TE, weights, "silu", S)
        finally:
            torch.set_num_threads(before)
    h = ops.expert_up._init_fn(x, mask, *weights[:4], "silu", S)
    expected = ops.expert_down._init_fn(h, mask, weights_TE, *weights[4:], S)
    torch.testing.assert_close(found, expected)


def few_active(T: int, E: int) -> Tensor:
    """A mask under which experts 1, 4 and the last, smaller one are used, each by another token if there are some."""
    mask = torch.zeros(T, E, dtype=torch.bool)
    for place, expert in enumerate((1, 4, E - 1)):
        mask[place % T, expert] = True
    return mask


BIG = dict(D=512, F=1019, S=32)  # the bytes of a bfloat16 row matrix are above SMALL_BYTES


@DTYPES
@pytest.mark.parametrize("T", [1, 3])
def test_rows_of_inactive_experts_are_never_read(T: int, dtype: torch.dtype) -> None:
    """They hold NaN, which would show: with the thresholds as they are."""
    layer, x = Layer(**BIG), tokens(T, BIG["D"], dtype)
    mask = few_active(T, 32)
    expected = layer.formula(x, mask, None, dtype)
    unused = ~expand_experts(mask.any(0, keepdim=True), BIG["S"], BIG["F"])[0]
    for rows in (layer.up, layer.gate, layer.down):
        rows[unused] = float("nan")  # type: ignore[index]
    assert_near(layer.run_ops(x, mask, None), expected, dtype)
    found = cpu.masked_ffn(x, mask, None, layer.weights(dtype), "silu", BIG["S"])
    assert_near(found, expected, dtype)


class Sizes(TorchDispatchMode):
    """Records how many elements every fresh result of an operator has."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, out.numel())
        return result


def test_no_rows_are_copied() -> None:
    layer, x = Layer(**BIG), tokens(1, BIG["D"], torch.float32)
    weights, mask = layer.weights(x.dtype), few_active(1, 32)
    with Sizes() as copying:
        weights[0].index_select(0, torch.arange(91))  # type: ignore[union-attr]
    assert copying.largest == 91 * BIG["D"], "this test would see a copy of the active rows"
    with Sizes() as sizes:
        cpu.masked_ffn(x, mask, None, weights, "silu", BIG["S"])
    assert sizes.largest <= 4 * BIG["F"]


@pytest.mark.parametrize("T", [1, 4])
def test_low_precision_router_weights_are_not_converted_at_once(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_router, "CACHED_BYTES", 40_000)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((T, 64), (1001, 64), (1001,)))
    with Sizes() as sizes:
        found = cpu.router_scores(x, weight, bias)
    assert sizes.largest <= 40_000 // 4
    expected = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [0, 1, 2, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_router_scores(T: int, dtype: torch.dtype) -> None:
    x, weight = tokens(T, 33, dtype), tokens(77, 33, dtype)
    found = ops.router_scores(x, weight, None)
    assert found.dtype == torch.float32 and found.shape == (T, 77)
    torch.testing.assert_close(found, (x.double() @ weight.double().t()).float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(
    T=st.integers(0, 18),
    D=st.integers(1, 40),
    E=st.integers(1, 40),
    bias=st.booleans(),
    router_norm=st.booleans(),
    size=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    block=st.sampled_from([1, 200, 2 << 20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_router_scores_are_the_reference(
    T: int, D: int, E: int, bias: bool, router_norm: bool, size: float, block: int, dtype: torch.dtype
) -> None:
    x, weight, bias_E = (size * tokens(T, D)).to(dtype), tokens(E, D, dtype), tokens(1, E, dtype)[0] if bias else None
    expected = router_scores_reference(x, weight, bias_E, router_norm).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_router, "CACHED_BYTES", block)
        found = ops.router_scores(x, weight, bias_E, router_norm)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, size))
    default = ops.router_scores._init_fn(x, weight, bias_E, router_norm)
    torch.testing.assert_close(default, expected, rtol=1e-5, atol=1e-5 * max(1.0, size))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda w: w.t().contiguous().t(),
    "wide-rows": lambda w: torch.cat([w, torch.full_like(w, float("nan"))], dim=1)[:, : w.shape[1]],
    "half": lambda w: torch.cat([w, torch.full_like(w, float("nan"))]).chunk(2)[0],
}


@pytest.mark.parametrize("kind", STRIDES)
def test_weights_of_any_strides(kind: str) -> None:
    layer, x, mask = Layer(**BIG), tokens(1, BIG["D"], torch.float32), few_active(1, 32)
    expected = layer.formula(x, mask, None, x.dtype)
    weights = FFNWeights(*(w if w is None or w.dim() == 1 else STRIDES[kind](w) for w in layer.weights(x.dtype)))  # type: ignore[arg-type]
    found = cpu.masked_ffn(x, mask, None, weights, "silu", BIG["S"])
    assert_near(found, expected, x.dtype)


@pytest.mark.parametrize("T", [1, 3, 20])
def test_inputs_are_left_as_they_are(path: str, T: int) -> None:
    layer, mask = Layer(D=27, F=133, S=16), random_mask(T, 9, 0.5)
    x, weights_TE, weights = tokens(T, 27), torch.rand(T, 9), layer.weights(torch.float64)
    given = [x, mask, weights_TE, *weights]
    before = [t.clone() for t in given]  # type: ignore[union-attr]
    cpu.masked_ffn(x, mask, weights_TE, weights, "silu", 16)
    h = cpu.expert_up(x, mask, weights.up_part, "silu", 16)
    kept = h.clone()
    for m in (mask, torch.ones_like(mask)):
        cpu.expert_down(h, m, weights_TE, weights.down_FD, weights.down_bias_D, 16)
    assert torch.equal(h, kept)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))  # type: ignore[arg-type]


def test_full_activity_of_many_tokens_is_the_dense_ffn() -> None:
    """Bit for bit, and without a router."""
    layer, x = Layer(D=27, F=133, S=16), tokens(20, 27, torch.float32)
    up, up_b, gate, gate_b, down, down_b = layer.weights(x.dtype)
    linear = torch.nn.functional.linear
    h = torch.nn.functional.silu(linear(x, gate, gate_b)) * linear(x, up, up_b)  # type: ignore[arg-type]
    expected = linear(h, down.t(), down_b)  # type: ignore[union-attr]
    layer.router *= float("nan")
    assert torch.equal(layer.run(x, 1.0), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "share", "pays"),
    [
        pytest.param((8192, 2048), torch.bfloat16, 1, 1.0, True, id="one-token"),
        pytest.param((8192, 2048), torch.bfloat16, 4, 0.8, True, id="some-tokens"),
        pytest.param((8192, 2048), torch.bfloat16, 4, 2.0, False, id="many-pairs"),
        pytest.param((8192, 2048), torch.float32, 4, 2.0, True, id="float32"),
        pytest.param((8192, 2048), torch.float32, 17, 0.1, False, id="many-tokens"),
        pytest.param((1536, 576), torch.bfloat16, 4, 0.8, False, id="short-rows"),
        pytest.param((256, 64), torch.float32, 1, 0.1, False, id="small-layer"),
        pytest.param((8192, 2048), torch.float32, 0, 0.0, False, id="no-token"),
    ],
)
def test_where_gathering_pays(
    shape: tuple[int, int], dtype: torch.dtype, tokens: int, share: float, pays: bool
) -> None:
    rows = torch.empty(shape, dtype=dtype, device="meta")
    assert cpu_rows.dots_pay(int(share * shape[0]), tokens, rows) is pays
    sums = cpu_rows.sums_pay(int(share * shape[0]), tokens, rows)
    assert sums >= pays
    assert sums >= cpu_rows.sums_pay(int(share * shape[0]), tokens, rows, packed=True)


@pytest.mark.parametrize("every", [False, True], ids=["down", "every"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("dots", "sums"), [(a, b) for a in (False, True) for b in (False, True)])
def test_a_call_is_decided_once(
    dots: bool, sums: bool, packed: bool, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are asked for where a dense product would read them, and thresholds know of them."""
    asked: list[str] = []
    told: list[tuple[int, int, bool]] = []

    class Fake(Packs):
        def of(self, name: str, weight_oi: Tensor) -> Tensor | None:  # type: ignore[override]
            asked.append(name)
            return torch.zeros(()) if packed and (every or name == "down") else None

    def answer(value: bool) -> Callable[..., bool]:
        def pays(pairs: int, tokens: int, rows: Tensor, packed: bool = False) -> bool:
            told.append((pairs, tokens, packed))
            return value

        return pays

    monkeypatch.setattr(cpu_rows, "dots_pay", answer(dots))
    monkeypatch.setattr(cpu_rows, "sums_pay", answer(sums))
    weights = Layer(D=27, F=133, S=16).weights(torch.float64)
    how = cpu.choose(18, (2, 9), 16, weights, Fake(every))
    assert (how.everything, how.gather_up, how.gather_down) == (True, dots, sums)
    assert asked == ["down", *(["gate", "up"] if packed and not dots else [])]
    assert (how.packed_down is not None) is packed
    copies = packed and every and not dots
    assert (how.packed_up is not None, how.packed_gate is not None) == (copies, copies)
    assert {(pairs, tokens) for pairs, tokens, _ in told} == {(18 * 16, 2)}
    assert told[-1][2] is packed and all(knows is (packed and every) for _, _, knows in told[:-1])
    assert not cpu.choose(17, (2, 9), 16, weights).everything


@pytest.mark.parametrize("rule", ["reach", "below"])
@given(
    T=st.integers(1, 5),
    E=st.integers(1, 70),
    tau=st.one_of(st.floats(1e-3, 1.0), st.just(0.5)),
    levels=st.sampled_from([1, 2, 5, None]),
    scale=st.floats(0.1, 30),
    seed=st.integers(0, 1000),
)
def test_selection_is_the_definition(
    rule: Rule, T: int, E: int, tau: float, levels: int | None, scale: float, seed: int
) -> None:
    """Bit for bit: with ties, which few levels of scores bring about, and with scores so far apart that p is 0."""
    scores = scale * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    if levels is not None:
        scores = torch.randint(levels, (T, E), generator=torch.Generator().manual_seed(seed)).float()
    tau = torch.tensor(tau)
    expected = mask_from_scores(scores, tau, rule)
    assert torch.equal(cpu_select.select_experts(scores, tau, rule), expected)
    for scores_E, mask_E in zip(scores, expected, strict=True):
        active = cpu_select.active_experts(scores_E, float(tau), rule)
        assert torch.equal(active.sort().values, mask_E.nonzero().squeeze(1))


@pytest.mark.parametrize("rule", ["reach", "below"])
def test_nan_scores_activate_every_expert_of_their_token(rule: Rule) -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    scores[1, 7] = float("nan")
    mask = cpu_select.select_experts(scores, 0.5, rule)
    assert torch.equal(mask, mask_from_scores(scores, torch.tensor(0.5), rule))
    assert mask[1].all() and not mask[0].all()
    assert sorted(cpu_select.active_experts(scores[1], 0.5, rule).tolist()) == list(range(40))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("T", [0, 1, 2, 33])
@DTYPES
def test_linear(T: int, transposed: bool, bias: bool, dtype: torch.dtype) -> None:
    x, w, b = tokens(T, 45, dtype), tokens(77, 45, dtype), tokens(1, 77, dtype)[0]
    w = w.t().contiguous().t() if transposed else w
    found = cpu_dense.linear(x, w, b if bias else None)
    expected = x.double() @ w.double().t() + (b.double() if bias else 0)
    assert_near(found, expected, dtype)


def test_linear_heeds_the_switch_of_onednn() -> None:
    x, w = tokens(3, 45, torch.float32), tokens(77, 45, torch.float32)
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with Names() as names:
            cpu_dense.linear(x, w, None)
    finally:
        torch.backends.mkldnn.enabled = before
    assert not any("mkldnn" in name for name in names.seen)


class Names(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@DTYPES
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize(("F", "S"), [(64, 8), (72, 16), (60, 8), (35, 5), (7, 9)])
def test_masking_in_place(F: int, S: int, offset: int, dtype: torch.dtype) -> None:
    """Wide elements or not, also from an odd address; NaN of an inactive neuron does not stay."""
    mask = random_mask(3, -(-F // S), 0.5)
    h = tokens(1, 3 * F + offset, dtype)[0, offset:].view(3, F)
    h = torch.where(tokens(3, F) > 1.5, float("nan"), h) if not offset else h
    expected = zero_inactive(h, mask, S)
    torch.testing.assert_close(cpu_dense.mask_(h, mask, S), expected, rtol=0, atol=0, equal_nan=True)


def test_bags_of_a_single_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large layers sum in a bag a thread, small ones in a single bag: the same sums."""
    layer = Layer(**BIG)
    mask = few_active(1, 32)
    found = []
    for small in (0, 1 << 40):
        pairs = []
        with monkeypatch.context() as patch:
            patch.setattr(cpu_rows, "SMALL_BYTES", small)
            pairs = cpu_rows.find_pairs(mask, BIG["S"], layer.up.float())
        h = torch.ones(len(pairs.rows_P))
        found.append(cpu_rows.sum_rows(h, pairs, layer.down.float(), None))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_layer_skips_the_dispatch_unless_something_intercepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ARCHITECTURES["llama"]()
    config = SparsifyConfig(expert_size=8, partition="contiguous", router="centroid", budget="uniform")
    sparsify(model.eval(), tau=0.5, config=config, progress=False)
    direct: list[int] = []

    right = cpu.sparse_ffn

    def watched(x_TD: Tensor, *args: Any) -> Tensor:
        if len(args) > 5:  # with the layer's packs: not called by the operator
            direct.append(len(x_TD))
        return right(x_TD, *args)

    monkeypatch.setattr(cpu, "sparse_ffn", watched)
    with torch.no_grad():
        plain = model(**inputs)[0]
        assert direct
        direct.clear()
        with Names() as names:
            intercepted = model(**inputs)[0]
    assert not direct and "prunepath.sparse_ffn.default" in names.seen
    assert torch.equal(plain, intercepted)
