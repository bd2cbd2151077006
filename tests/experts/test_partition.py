"""Partitions: what must hold for any input, clusters that are there to be found, and a reference from outside."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.experts.kmeans import _assign, balanced_kmeans, sum_of_squares, tidy
from torch_prunepath.experts.partition import (
    coactivation,
    contiguous,
    contribution_features,
    partition,
    random,
    weight_features,
)
from torch_prunepath.layer.ffn import FFNView

METHODS = ["coactivation", "kmeans", "contiguous", "random"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=generator(seed))


def groups(order: Tensor, size: int) -> list[frozenset[int]]:
    return [frozenset(part.tolist()) for part in order.split(size)]


def planted(n: int, dim: int, size: int, spread: float, seed: int = 0) -> tuple[Tensor, set[frozenset[int]]]:
    """Shuffled rows around one far centre a cluster, the last cluster smaller, and the clusters."""
    centres = 10 * noise(-(-n // size), dim, seed)
    shuffle = torch.randperm(n, generator=generator(seed))
    rows = centres[shuffle // size] + spread * noise(n, dim, seed + 1)
    return rows, {frozenset((shuffle // size == e).nonzero().flatten().tolist()) for e in range(len(centres))}


class FFN(nn.Module):
    def __init__(self, gated: bool, ffn_size: int = 24, hidden_size: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(hidden_size, ffn_size)
        self.gate = nn.Linear(hidden_size, ffn_size) if gated else None
        self.down = nn.Linear(ffn_size, hidden_size)


def view_of(ffn: FFN) -> FFNView:
    gate = None if ffn.gate is None else "gate"
    return FFNView(ffn, FFNSpec("", "up", "down", "silu", ffn.up.in_features, ffn.up.out_features, gate=gate))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Rows, often equal or zero ones among them, and an expert size from 1 to more than there are rows."""
    n, dim, size = draw(st.integers(1, 40)), draw(st.integers(1, 5)), draw(st.integers(1, 45))
    rows = noise(n, dim, draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["plain", "few distinct", "half zero", "all equal", "huge", "tiny", "offset"]))
    if kind == "few distinct":
        rows = rows[torch.randint(0, n, (n,), generator=generator(n)) % 3 % n]
    elif kind == "half zero":
        rows[::2] = 0
    elif kind == "all equal":
        rows = rows[:1].expand(n, dim)
    elif kind == "huge":
        rows = rows * 1e37
    elif kind == "tiny":
        rows = rows * 1e-37
    elif kind == "offset":
        rows = rows + 1000
    return rows, size


@settings(deadline=None, max_examples=200)
@given(problems(), st.integers(0, 3))
def test_kmeans_gives_a_tidy_permutation(problem: tuple[Tensor, int], seed: int) -> None:
    rows, size = problem
    order = balanced_kmeans(rows, size, seed=seed)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(len(rows)))
    parts = [part.tolist() for part in order.split(size)]
    assert all(part == sorted(part) for part in parts)
    whole = [part for part in parts if len(part) == size]
    assert [part[0] for part in whole] == sorted(part[0] for part in whole)
    assert torch.equal(order, balanced_kmeans(rows, size, seed=seed))


@settings(deadline=None, max_examples=200)
@given(problems(), st.integers(0, 3))
def test_kmeans_is_never_worse_than_the_rows_as_they_come(problem: tuple[Tensor, int], seed: int) -> None:
    rows, size = problem
    as_given = sum_of_squares(rows, contiguous(len(rows)), size)
    rounding = 1e-5 * float((rows.double() - rows.double().mean(0)).square().sum())
    # What float32 cannot tell from an offset it cannot cluster either.
    rounding += 1e-6 * len(rows) * float(rows.double().abs().max() * rows.double().std(0, correction=0).max())
    assert sum_of_squares(rows, balanced_kmeans(rows, size, seed=seed), size) <= as_given + rounding


def test_clusters_once_found_are_not_lost() -> None:
    """A converted checkpoint that is partitioned again: its rows come in good clusters."""
    rows = noise(200, 3)
    best = min((balanced_kmeans(rows, 8, seed=seed) for seed in range(6)), key=lambda o: sum_of_squares(rows, o, 8))
    found = [sum_of_squares(rows[best], balanced_kmeans(rows[best], 8, seed=seed), 8) for seed in range(6)]
    assert max(found) <= sum_of_squares(rows, best, 8) * (1 + 1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(4, 60), st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6))
def test_kmeans_is_never_worse_than_random(n: int, dim: int, size: int, seed: int) -> None:
    rows = noise(n, dim, seed)
    found = sum_of_squares(rows, balanced_kmeans(rows, size), size)
    average = sum(sum_of_squares(rows, random(n, other), size) for other in range(20)) / 20
    assert found <= average * (1 + 1e-5)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 9), st.integers(2, 12), st.integers(1, 9), st.integers(0, 10**6))
def test_separate_clusters_are_found_exactly(size: int, count: int, last: int, seed: int) -> None:
    rows, clusters = planted((count - 1) * size + min(last, size), 16, size, 0.1, seed)
    assert set(groups(balanced_kmeans(rows, size), size)) == clusters


@pytest.mark.parametrize("n", [256, 250], ids=["whole", "smaller last"])
def test_many_noisy_clusters_are_found_exactly(n: int) -> None:
    rows, clusters = planted(n, 64, 8, 3.0)
    assert set(groups(balanced_kmeans(rows, 8), 8)) == clusters


def test_copies_of_a_row_stay_together() -> None:
    shuffle = torch.randperm(96, generator=generator(0))
    rows = noise(12, 20).repeat_interleave(8, 0)[shuffle]
    assert sum_of_squares(rows, balanced_kmeans(rows, 8), 8) < 1e-6
    assert sum_of_squares(rows, balanced_kmeans(rows, 4), 4) < 1e-6


def test_many_equal_rows_beside_clusters() -> None:
    """Neurons that never contribute: they fill experts of their own, without disturbing the others."""
    rows, clusters = planted(64, 16, 8, 0.1)
    rows = torch.cat([torch.zeros(192, 16), rows])
    assert {frozenset(row + 192 for row in cluster) for cluster in clusters} < set(groups(balanced_kmeans(rows, 8), 8))


def test_swaps_do_what_lloyd_cannot() -> None:
    """Small clusters of high-dimensional rows: each row is nearest to the mean that holds a part of it."""
    rows = torch.nn.functional.normalize(noise(512, 256), dim=1)
    order = balanced_kmeans(rows, 8)
    assert sum_of_squares(rows, order, 8) < 0.93 * sum_of_squares(rows, contiguous(512), 8)


def test_who_loses_most_chooses_first() -> None:
    scores = torch.tensor([[3.0, 2.0, 0.0], [3.0, -9.0, 1.0], [3.0, 2.5, 2.0], [0.0, 5.0, 0.0]])
    assert _assign(scores, torch.tensor([1, 2, 1])).tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e30])
def test_scale_and_offset_change_nothing(scale: float) -> None:
    rows, clusters = planted(100, 12, 8, 1.0)
    assert set(groups(balanced_kmeans(rows * scale, 8), 8)) == clusters
    assert set(groups(balanced_kmeans((rows + 1e4) * scale, 8), 8)) == clusters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_and_strides_are_computed_in_float32(dtype: torch.dtype) -> None:
    rows = noise(60, 12).to(dtype)
    assert torch.equal(balanced_kmeans(rows, 7), balanced_kmeans(rows.float(), 7))
    assert torch.equal(balanced_kmeans(rows.T.contiguous().T, 7), balanced_kmeans(rows, 7))


def test_inputs_are_left_alone() -> None:
    rows = noise(40, 8).requires_grad_()
    before = rows.detach().clone()
    assert not balanced_kmeans(rows, 8).requires_grad
    assert torch.equal(rows.detach(), before)
    contributions = noise(30, 40).abs()
    before = contributions.clone()
    coactivation(contributions, 8)
    assert torch.equal(contributions, before)


def test_seed_decides_and_the_global_generator_does_not() -> None:
    rows = noise(200, 3)
    orders = [balanced_kmeans(rows, 8, seed=seed) for seed in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) > 1
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(balanced_kmeans(rows, 8, seed=2), orders[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(find_spec("k_means_constrained") is None, reason="needs k-means-constrained")
@pytest.mark.parametrize(
    ("n", "dim", "size", "kind"),
    [
        (256, 64, 8, "clusters"),
        (256, 64, 8, "none"),
        (512, 16, 16, "clusters"),
        (512, 8, 16, "none"),
        (768, 128, 32, "overlapping"),
        (768, 8, 32, "none"),
    ],
)
def test_within_five_percent_of_optimal_assignment(n: int, dim: int, size: int, kind: str) -> None:
    from k_means_constrained import KMeansConstrained

    spread = {"clusters": 2.0, "overlapping": 15.0}
    rows = noise(n, dim) if kind == "none" else planted(n, dim, size, spread[kind])[0]
    rows = torch.nn.functional.normalize(rows, dim=1)
    theirs = KMeansConstrained(n_clusters=n // size, size_min=size, size_max=size, n_init=1, random_state=0)
    theirs.fit(rows.double().numpy())
    assert sum_of_squares(rows, balanced_kmeans(rows, size), size) <= 1.05 * theirs.inertia_


# --- contributions ----------------------------------------------------------------------------------------------------


def coactive(tokens: int = 200, count: int = 6, size: int = 8) -> tuple[Tensor, set[frozenset[int]]]:
    """Contributions of neurons in ``count`` groups: each token uses two groups, each neuron has its own scale."""
    rng = generator(0)
    shuffle = torch.randperm(count * size, generator=rng)
    used = torch.rand(tokens, count, generator=rng).argsort(1) < 2
    scale = 1 + torch.rand(count * size, generator=rng)
    contributions = used[:, shuffle // size] * scale * (0.5 + torch.rand(tokens, count * size, generator=rng))
    return contributions, {frozenset((shuffle // size == e).nonzero().flatten().tolist()) for e in range(count)}


def test_neurons_that_contribute_together_share_an_expert() -> None:
    contributions, clusters = coactive()
    assert set(groups(coactivation(contributions, 8), 8)) == clusters


def test_outlier_tokens_and_silent_tokens_do_not_matter() -> None:
    contributions, clusters = coactive()
    contributions[::7] *= 1e6
    contributions[1::7] *= 1e-30
    contributions[2::7] = 0
    assert set(groups(coactivation(contributions, 8), 8)) == clusters


def test_silent_neurons_gather() -> None:
    contributions = noise(300, 64).abs()
    contributions[:, ::4] *= 1e-3
    quiet = frozenset(range(0, 64, 4))
    assert {part <= quiet for part in groups(coactivation(contributions, 8), 8) if part & quiet} == {True}


def test_contribution_features() -> None:
    contributions = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2e38, 2e38]])
    features = contribution_features(contributions)
    assert features.is_contiguous()
    torch.testing.assert_close(features, torch.tensor([[2.0, 0.0, 4.0], [6.0, 0.0, 4.0]]) / 4)
    many = torch.rand(1000, 5, generator=generator(0))  # more than one block of tokens
    expected = (many / many.mean(1, keepdim=True)).T
    torch.testing.assert_close(contribution_features(many), expected)
    torch.testing.assert_close(contribution_features(many.half()), expected, rtol=1e-2, atol=1e-2)


# --- dispatcher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_weight_features(gated: bool) -> None:
    ffn = FFN(gated).bfloat16()
    rows = (ffn.gate if ffn.gate is not None else ffn.up).weight.float()
    found = weight_features(view_of(ffn))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, rows / rows.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("size", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_tidy_permutation(name: str, size: int) -> None:
    view, contributions = view_of(FFN(gated=True)), noise(50, 24).abs()
    order = partition(name, view, contributions, size, seed=3)  # type: ignore[arg-type]
    assert sorted(order.tolist()) == list(range(24))
    assert torch.equal(order, tidy(order, size))
    assert torch.equal(order, partition(name, view, contributions, size, seed=3))  # type: ignore[arg-type]


def test_the_dispatcher_calls_what_it_names() -> None:
    view, contributions = view_of(FFN(gated=True)), noise(50, 24).abs()
    assert torch.equal(partition("contiguous", view, None, 8), torch.arange(24))
    assert torch.equal(partition("random", view, None, 8, seed=5), tidy(random(24, 5), 8))
    assert torch.equal(partition("kmeans", view, None, 8, 5), balanced_kmeans(weight_features(view), 8, seed=5))
    assert torch.equal(partition("coactivation", view, contributions, 8, 5), coactivation(contributions, 8, seed=5))


def test_random_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = random(50, 7)
    assert torch.equal(first, random(50, 7)) and not torch.equal(first, random(50, 8))


def test_tidy_keeps_clusters_and_the_smaller_one_last() -> None:
    assert tidy(torch.tensor([5, 3, 6, 1, 4, 2, 0]), 3).tolist() == [1, 2, 4, 3, 5, 6, 0]


def test_sum_of_squares() -> None:
    rows = torch.tensor([[0.0], [2.0], [10.0], [14.0], [7.0]])
    assert sum_of_squares(rows, torch.arange(5), 2) == 2 + 8
    assert sum_of_squares(rows, torch.tensor([0, 2, 1, 3, 4]), 2) == 50 + 72


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_refused(bad: float) -> None:
    rows = noise(20, 4)
    rows[3, 2] = bad
    with pytest.raises(ValueError, match="features must be finite"):
        balanced_kmeans(rows, 8)
    with pytest.raises(ValueError, match="contributions must be finite"):
        coactivation(rows.abs() if bad != float("-inf") else rows, 2)
    with pytest.raises(ValueError, match="finite"):
        balanced_kmeans(rows, 100)  # also where there is nothing to decide


@pytest.mark.parametrize("rows", [torch.zeros(4), torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3, 3).long()])
def test_what_is_no_matrix_of_floats_is_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="features must be a floating-point matrix"):
        balanced_kmeans(rows, 2)
    with pytest.raises(ValueError, match="contributions must be a floating-point matrix"):
        coactivation(rows, 2)


def test_arguments_out_of_range_are_refused() -> None:
    view = view_of(FFN(gated=False))
    with pytest.raises(ValueError, match="expert_size=0"):
        balanced_kmeans(noise(4, 2), 0)
    with pytest.raises(ValueError, match="iterations=0"):
        balanced_kmeans(noise(4, 2), 2, iterations=0)
    with pytest.raises(ValueError, match="expert_size=0"):
        partition("contiguous", view, None, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        coactivation(noise(20, 8), 4)
    for make in (contiguous, lambda size: random(size, 0)):
        with pytest.raises(ValueError, match="ffn_size=0"):
            make(0)


def test_the_dispatcher_says_what_is_missing() -> None:
    view = view_of(FFN(gated=False))
    with pytest.raises(ValueError, match=r"there is none: pass calibration data, or choose partition='kmeans'"):
        partition("coactivation", view, None, 8)
    with pytest.raises(ValueError, match=r"shape \[10, 23\], and the FFN 24 neurons"):
        partition("coactivation", view, torch.ones(10, 23), 8)
    with pytest.raises(ValueError, match="partition='magic' is not known"):
        partition("magic", view, None, 8)  # type: ignore[arg-type]
