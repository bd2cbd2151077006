"""The loss terms of one batch, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.inputs.data import Inputs
from torch_prunepath.train import losses
from torch_prunepath.train.batches import logit_weights, on_device
from torch_prunepath.train.config import ROUTER_LOSSES, TrainConfig
from torch_prunepath.train.shard import check_sharded
from torch_prunepath.train.tape import RoutedCall, RoutingTape
from torch_prunepath.train.targets import beside_the_layer, dense_output, fit_sample, sample_start, sample_tokens


def check_model(model: nn.Module, tape: RoutingTape, config: TrainConfig, teacher: nn.Module | None) -> None:
    """Refuse a model, config and teacher that do not fit together.

    Raises:
        ValueError: if ``distill_logits`` and the teacher are not given together, if no loss trains the routers although
            nothing else is trained, or as :func:`torch_prunepath.train.shard.check_sharded`.
    """
    if config.distill_logits and teacher is None:
        raise ValueError("distill_logits needs the dense model: pass teacher=, or set it to 0")
    if teacher is not None and not config.distill_logits:
        raise ValueError("a teacher is given, but distill_logits is 0: give it a weight, or leave the teacher out")
    gates = {layer.experts.gate for layer in tape.layers.values()}
    if config.train == "routers" and gates == {"one"} and not config.trains_routers_apart:
        raise ValueError(
            "nothing trains the routers: with gate='one' the model's output has no gradient towards them; "
            f"give one of {', '.join(ROUTER_LOSSES)} a weight"
        )
    check_sharded(model, config)


@dataclass
class Inside:
    """Results computed while a layer runs, when its weights are whole (FSDP2 shards them again afterwards).

    Attributes:
        terms: the losses of this call by name, 0-d float32.
        dense_TD: the layer's output with every expert active.
    """

    terms: dict[str, Tensor]
    dense_TD: Tensor | None = None


class Targets:
    """Computes what :func:`batch_terms` needs inside each layer, while the tape records; torch.compile can trace it.

    Args:
        config: the weights of the terms.
        seed: seed of sampled tokens.
        device: device of the model's input.
    """

    def __init__(self, config: TrainConfig, seed: str, device: torch.device) -> None:
        self.config = config
        self.start = on_device({"start": sample_start(seed)}, device)["start"]

    def __call__(self, call: RoutedCall) -> Inside:
        """Compute the terms of one call; :class:`torch_prunepath.train.RoutingTape` calls this as its ``inside``."""
        config, device = self.config, call.scores_TE.device
        with beside_the_layer(device):
            dense_TD = dense_output(call.view, call.x_TD) if config.distill_ffn else None
            fit = None
            if config.contribution_fit:
                some_N = sample_tokens(call.scores_TE, config.fit_tokens, self.start)
                fit = fit_sample(call, some_N, config.fit_detached)
            with torch.autocast(device.type, enabled=False):
                return Inside(self._terms(call, fit), dense_TD)

    def _terms(self, call: RoutedCall, fit: tuple[Tensor, Tensor, Tensor | None] | None) -> dict[str, Tensor]:
        config, terms = self.config, {}
        scores = call.layer.routed(call.scores_TE), call.weight_T
        if config.entropy:
            terms["entropy"] = losses.entropy(*scores)
        if config.load_balance:
            terms["load_balance"] = losses.load_balance(*scores)
        if config.lte_separation:
            terms["lte_separation"] = losses.lte_separation(*scores, eta=config.separation_eta)
        if fit is not None:
            terms["contribution_fit"] = losses.contribution_fit(*fit)
        return terms


def batch_terms(
    config: TrainConfig, tape: RoutingTape, output: Any, batch: Inputs, teacher_logits: Tensor | None
) -> dict[str, Tensor]:
    """Return the terms whose weight is not 0, unweighted, each 0-d float32.

    Args:
        config: the weights of the terms.
        tape: the tape of the forward pass that gave ``output``, with :class:`Targets` as its ``inside``.
        output: the model's output, with ``loss`` and ``logits`` as far as they are needed.
        batch: the model's inputs.
        teacher_logits: the teacher's logits on the same batch; needed for ``distill_logits``.

    Raises:
        ValueError: if the model returned no loss, or student and teacher differ in the shape of their logits.
    """
    terms: dict[str, Tensor] = {}
    for name in config.losses:
        if name == "task":
            terms[name] = _task(output)
        elif name == "distill_logits":
            assert teacher_logits is not None
            terms[name] = _distill_logits(output.logits, teacher_logits, batch, config.temperature)
        else:
            device = tape.calls[0].scores_TE.device
            terms[name] = torch.stack([_of_call(name, call).to(device) for call in tape.calls]).mean()
    return terms


def _of_call(name: str, call: RoutedCall) -> Tensor:
    if name == "distill_ffn":
        assert call.y_TD is not None
        return losses.distill_ffn(call.y_TD, call.inside.dense_TD, call.weight_T)
    return call.inside.terms[name]  # type: ignore[no-any-return]


def _task(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError("the model returned no loss: name the labels as its forward() does, or set task=0")
    return loss  # type: ignore[no-any-return]


def _distill_logits(logits: Tensor, teacher_logits: Tensor, batch: Inputs, temperature: float) -> Tensor:
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher differ in the shape of their logits, {tuple(logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: use a teacher with the same vocabulary"
        )
    V = logits.shape[-1]
    weight_T = logit_weights(batch, tuple(logits.shape[:-1]))
    return losses.distill_logits(
        logits.reshape(-1, V), teacher_logits.reshape(-1, V), weight_T, temperature=temperature
    )
