"""Both selection kernels against the definition: what may differ lies within 1e-5 of tau, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prunepath.layer.reference import select_reference

kernels = pytest.importorskip("torch_prunepath.csrc_triton.ffn")
NEAR = 1e-5


def mass_before(scores: list[float], rule: str) -> list[float]:
    """What is compared with tau, of every expert, in float64."""
    p = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))
    mass, total = [0.0] * len(p), 0.0
    for e in order:
        mass[e] = total + (p[e] if rule == "below" else 0.0)
        total += p[e]
    return mass


def assert_selected(found_TE: Tensor, scores_TE: Tensor, tau: float, rule: str) -> None:
    for found, scores in zip(found_TE.tolist(), scores_TE.tolist(), strict=True):
        expected, mass = select_reference(scores, tau, rule), mass_before(scores, rule)
        wrong = [e for e in range(len(scores)) if found[e] != expected[e] and abs(mass[e] - tau) > NEAR]
        assert not wrong, (scores, tau, rule, wrong, found)
        assert any(found)


def by_rank(scores_TE: Tensor, tau: Tensor, rule: str, shared: int = 0) -> Tensor:
    """The kernel for few tokens; what it leaves for the next kernels is checked on the way."""
    T, E = scores_TE.shape
    work = kernels.workspace(E, 3, scores_TE.device)
    for tensor in work[1:]:
        tensor.zero_()
    mask_TE, weights_TE = kernels.rank(scores_TE.unsqueeze(0), tau, rule, 0.25, work, None, shared)
    expected = torch.where(mask_TE, torch.sigmoid(scores_TE + 0.25), 0.0)
    expected[:, :shared] = 1.0
    torch.testing.assert_close(weights_TE, expected)
    if T == 1:
        assert int(work.length) == int(mask_TE.sum())
        listed = sorted(work.order_E[: int(work.length)].tolist())
        assert listed == mask_TE[0].nonzero().flatten().tolist()
    else:
        assert work.used_E.tolist() == mask_TE.any(0).int().tolist()
    return mask_TE


def by_search(scores_TE: Tensor, tau: Tensor, rule: str, shared: int = 0) -> Tensor:
    used_E = torch.zeros(scores_TE.shape[1], dtype=torch.int32, device=scores_TE.device)
    mask_TE, weights_TE = kernels.select_weights(scores_TE.unsqueeze(0), tau, rule, None, used_E, None, shared)
    assert torch.equal(weights_TE, mask_TE.float())
    assert torch.equal(kernels.select_experts(scores_TE, tau, rule, shared), mask_TE)
    assert used_E.tolist() == mask_TE.any(0).int().tolist()
    return mask_TE


# Probabilities are equal, or further apart than float32 rounds: which of two nearly equal ones leads is left open.
values = st.integers(-30 << 16, 30 << 16).map(lambda i: i / 65536) | st.sampled_from([0.0, -0.0, 1.0, 1.0, -2.5])


@pytest.mark.parametrize("select", [by_rank, by_search])
@settings(deadline=None, max_examples=60)
@given(
    scores=st.integers(1, 2).flatmap(
        lambda T: st.integers(1, 40).flatmap(
            lambda E: st.lists(st.lists(values, min_size=E, max_size=E), min_size=T, max_size=T)
        )
    ),
    tau=st.floats(2**-10, 1.0, width=32),
    rule=st.sampled_from(["reach", "below"]),
)
def test_selection(select, scores: list[list[float]], tau: float, rule: str) -> None:  # type: ignore[no-untyped-def]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores_TE = torch.tensor(scores, device=device)
    mask_TE = select(scores_TE, torch.tensor(tau, device=device), rule)
    assert_selected(mask_TE, scores_TE, tau, rule)
    if tau == 1.0:
        assert mask_TE.all()


@pytest.mark.parametrize("select", [by_rank, by_search])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("experts", "shared"), [(2, 1), (17, 5), (33, 32), (129, 3)])
def test_shared_experts(device: str, select, experts: int, shared: int, tokens: int) -> None:  # type: ignore[no-untyped-def]
    """Active, whatever their scores are; the others are selected as if they were alone."""
    scores_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)).to(device) * 3
    scores_TE[:, 0], scores_TE[:, shared - 1] = -90.0, 90.0
    for tau, rule in ((0.7, "reach"), (0.7, "below"), (1.0, "reach"), (1e-3, "below")):
        mask_TE = select(scores_TE, torch.tensor(tau, device=device), rule, shared)
        assert mask_TE[:, :shared].all()
        assert_selected(mask_TE[:, shared:], scores_TE[:, shared:], tau, rule)


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("experts", [1, 17, 129, 1024, 2368])
def test_sizes(device: str, experts: int, tokens: int) -> None:
    if tokens * experts > 100_000 and device == "cpu":
        pytest.skip("takes long in the interpreter")
    scores_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)).to(device) * 3
    scores_TE[0] = scores_TE[0].round()  # ties
    tau = torch.tensor(0.8, device=device)
    for rule in ("reach", "below"):
        for select in (by_rank, by_search) if tokens <= 2 else (by_search,):
            assert_selected(select(scores_TE, tau, rule), scores_TE, 0.8, rule)


@pytest.mark.parametrize("select", [by_rank, by_search])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_token_gets_every_expert(device: str, select, bad: float) -> None:  # type: ignore[no-untyped-def]
    scores_TE = torch.randn(2, 9, device=device)
    scores_TE[1, 4] = bad
    work = kernels.workspace(9, 1, scores_TE.device)
    work.used_E.zero_()
    tau = torch.tensor(0.3, device=device)
    if select is by_rank:
        mask_TE = kernels.rank(scores_TE.unsqueeze(0), tau, "reach", None, work)[0]
    else:
        mask_TE = kernels.select_experts(scores_TE, tau, "reach")
    assert mask_TE[1].all() and not mask_TE[0].all()


def test_parts_are_summed(device: str) -> None:
    parts = torch.randn(3, 2, 37, device=device)
    tau = torch.tensor(0.7, device=device)
    expected = kernels.select_experts(parts.sum(0), tau, "reach")
    assert torch.equal(kernels.select_weights(parts, tau, "reach", None)[0], expected)
    work = kernels.workspace(37, 1, parts.device)
    work.used_E.zero_()
    assert torch.equal(kernels.rank(parts, tau, "reach", None, work)[0], expected)
