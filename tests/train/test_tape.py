"""The routing tape: what it keeps, padding, checkpointing; and the dense targets made from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_ids
from torch import nn

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparse_layers, sparsify
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.train import RoutingTape, TrainConfig, losses
from torch_prunepath.train.targets import dense_output, expert_shares, fit_sample, sample_start, sample_tokens
from torch_prunepath.train.terms import Targets, batch_terms

CONFIG = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform")
TERMS = TrainConfig(
    steps=1,
    entropy=1.0,
    load_balance=1.0,
    lte_separation=1.0,
    contribution_fit=1.0,
    distill_logits=1.0,
    distill_ffn=1.0,
)


def sparse(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = ARCHITECTURES[name]()
    return sparsify(model, tau=0.5, config=CONFIG, progress=False), inputs


@pytest.fixture(params=["llama", "gpt2", "opt"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return sparse(request.param)[0]


def padded(extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = nn.functional.pad(token_ids(), (0, extra), value=5)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    return ids, mask


def test_it_keeps_scores_with_their_graph_and_the_realised_sparsity(model: nn.Module) -> None:
    tape = RoutingTape(model, outputs=True)
    with tape, record_sparsity(model) as record:
        model(input_ids=token_ids())
    assert [call.name for call in tape.calls] == list(sparse_layers(model))
    for call in tape.calls:
        assert call.x_TD is not None and call.y_TD is not None and call.scores_TE.requires_grad
        torch.testing.assert_close(call.layer.router(call.x_TD), call.scores_TE)
    sparsity = tape.sparsity()
    assert sparsity.dim() == 0 and float(sparsity) == pytest.approx(record.sparsity, abs=1e-6)
    losses.entropy(tape.calls[0].scores_TE).backward()
    assert tape.calls[0].layer.router.weight.grad is not None


def test_reopening_starts_anew_and_leaves_no_hook(model: nn.Module) -> None:
    tape = RoutingTape(model)
    for _ in range(2):
        with tape:
            model(input_ids=token_ids())
    assert len(tape.calls) == len(sparse_layers(model))
    model(input_ids=token_ids())
    assert len(tape.calls) == len(sparse_layers(model))
    assert not any(layer.routing_hooks for layer in sparse_layers(model).values())
    assert not model._forward_hooks and not model._forward_pre_hooks


def terms_of(model: nn.Module, teacher: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, float]:
    batch = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    tape = RoutingTape(model, inputs=False, outputs=True, inside=Targets(TERMS, "seed", torch.device("cpu")))
    with tape:
        output = model(**batch, labels=labels)
    with torch.no_grad():
        logits = teacher(**batch).logits
    terms = batch_terms(TERMS, tape, output, {**batch, "labels": labels}, logits)
    return {**{name: float(term) for name, term in terms.items()}, "sparsity": float(tape.sparsity())}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padding_changes_no_term(name: str) -> None:
    (model, _), (teacher, _) = sparse(name), ARCHITECTURES[name]()
    plain = terms_of(model, teacher, token_ids(), None)
    assert set(plain) == {*TERMS.losses, "sparsity"} and all(plain.values())
    assert terms_of(model, teacher, *padded(5)) == pytest.approx(plain, rel=1e-4)
    # The same tokens, had they counted, would have changed every term.
    counted = terms_of(model, teacher, padded(5)[0], None)
    assert all(abs(counted[key] - plain[key]) > 1e-3 * abs(plain[key]) for key in plain)


def test_a_model_without_sparse_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="sparsify"):
        RoutingTape(ARCHITECTURES["llama"]()[0])


def test_an_empty_tape_is_refused(model: nn.Module) -> None:
    tape = RoutingTape(model)
    with tape:
        pass
    with pytest.raises(ValueError, match="no sparse layer ran"):
        tape.sparsity()


def gradients(model: nn.Module, inside: bool) -> dict[str, torch.Tensor]:
    """Of task loss and entropy; the backward pass inside the tape's context or after it."""
    model.zero_grad()
    tape = RoutingTape(model)
    with tape:
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        tape.check(gradient=True)
        loss = loss + sum(losses.entropy(call.scores_TE) for call in tape.calls)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert len(tape.calls) == len(sparse_layers(model))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
def test_gradient_checkpointing_records_once_and_gives_the_same_gradients(model: nn.Module, inside: bool) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    expected = gradients(model, inside=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    recomputed: list[str] = []
    handle = next(iter(sparse_layers(model).values())).register_routing_hook(lambda r: recomputed.append(r.name))
    found = gradients(model, inside)
    handle.remove()
    assert len(recomputed) == 2  # once forward, once in the backward pass
    assert found.keys() == expected.keys() and any("router" in name for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_reentrant_checkpointing_is_refused_with_the_remedy(model: nn.Module) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        gradients(model, inside=False)


def test_targets_are_what_the_dense_ffn_does(model: nn.Module) -> None:
    set_tau(model, 1.0)
    tape = RoutingTape(model, outputs=True)
    with tape:
        model(input_ids=token_ids())
    for call in tape.calls:
        assert call.x_TD is not None and call.y_TD is not None
        torch.testing.assert_close(dense_output(call.view, call.x_TD), call.y_TD.detach(), atol=1e-5, rtol=1e-4)
        assert float(losses.distill_ffn(call.y_TD, dense_output(call.view, call.x_TD))) < 1e-9


def test_shares_are_of_each_experts_own_contribution(model: nn.Module) -> None:
    name, view = next(iter(sparse_views(model).items()))
    size = sparse_layers(model)[name].experts.expert_size
    x_ND = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h_NF, down_FD = view.hidden(x_ND), view.down_FD
        norms = [(h_NF[:, s : s + size] @ down_FD[s : s + size]).norm(dim=-1) for s in range(0, h_NF.shape[1], size)]
    norms_NE = torch.stack(norms, -1)
    torch.testing.assert_close(expert_shares(view, x_ND, size), norms_NE / norms_NE.sum(-1, keepdim=True))


def fitted_gradients(model: nn.Module, detach: bool) -> set[str]:
    tape = RoutingTape(model)
    with tape:
        model(input_ids=token_ids())
    for call in tape.calls:
        losses.contribution_fit(*fit_sample(call, torch.tensor([0, 3, 4]), detach)).backward(retain_graph=True)
    found = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    model.zero_grad()
    return found


def test_the_fit_reaches_routers_only_unless_asked(model: nn.Module) -> None:
    routers = {name for name, _ in model.named_parameters() if ".router." in name}
    assert fitted_gradients(model, detach=True) == routers
    assert fitted_gradients(model, detach=False) > routers


def test_sampled_tokens() -> None:
    some, again, other = (sample_tokens(torch.zeros(100, 3), 10, sample_start(seed)) for seed in ("a", "a", "b"))
    assert some is not None and again is not None and other is not None
    assert torch.equal(some, again) and not torch.equal(some, other)
    assert len(set(some.tolist())) == 10 and max(some.tolist()) < 100
    assert sample_tokens(torch.zeros(10, 3), 10, sample_start("a")) is None


def test_layers_that_are_called_twice_are_recorded_twice() -> None:
    model, inputs = sparse("albert")

    tape = RoutingTape(model, outputs=True)
    with tape, record_sparsity(model) as record:
        model(**inputs)
    assert len(tape.calls) == 3 and len({call.name for call in tape.calls}) == 1
    assert all(call.y_TD is not None for call in tape.calls)
    assert float(tape.sparsity()) == pytest.approx(record.sparsity, abs=1e-6)
