"""Training a dense model (as it is, or statically pruned) with the same loop, optimiser and data as sparse ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from torch_prunepath.config import SparsifyConfig
from torch_prunepath.conversion import densify, sparsify
from torch_prunepath.discover import Which, find_ffns
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.loop import train
from torch_prunepath.train.schedule import all_experts

_DENSE_LOSSES = {"task", "distill_logits"}
"""Names of the losses that need neither routers nor experts."""


def train_dense(
    model: nn.Module,
    batches: Iterable[Any],
    config: TrainConfig,
    *,
    include: Which | None = None,
    exclude: Which | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train a dense model in place, as :func:`torch_prunepath.train.train` trains a sparse one.

    While it runs, each FFN is one expert that is always active. ``config.phases`` is ignored.

    Args:
        model: a dense model whose FFNs :func:`torch_prunepath.find_ffns` finds.
        batches: the batches, as for ``train``.
        config: the settings, as for ``train``; losses on routers or experts are refused.
        include: the FFNs that become one expert each while the model trains; None: all. As for
            :func:`torch_prunepath.sparsify`. All weights are trained.
        exclude: which of these stay as they are.
        **options: ``teacher``, ``compile``, ``progress`` and ``callback`` of ``train``.

    Raises:
        ValueError: if a loss other than the task's and ``distill_logits`` has a weight, ``config.train`` is
            ``"routers"``, a state is given, or ``train`` or ``sparsify`` refuses the model, batches or config.
    """
    foreign = [name for name in config.losses if name not in _DENSE_LOSSES]
    if foreign:
        raise ValueError(f"{foreign[0]} says nothing about a dense model: set it to 0")
    if config.train != "all":
        raise ValueError("train='routers' leaves nothing to train in a dense model: choose train='all'")
    if "state" in options:
        raise ValueError("the training of a dense model cannot be resumed from a state: leave state= out")
    with one_expert_each(model, include, exclude):
        return train(model, batches, dataclasses.replace(config, phases=(all_experts(),)), **options)


@contextlib.contextmanager
def one_expert_each(model: nn.Module, include: Which | None = None, exclude: Which | None = None) -> Iterator[None]:
    """Turn each FFN of a dense model into a sparse layer with one expert, always active, while the context is open."""
    widest = max(spec.ffn_size for spec in find_ffns(model, include, exclude))
    config = SparsifyConfig(expert_size=widest, partition="contiguous", router="zero", budget="uniform")
    sparsify(model, tau=1.0, config=config, include=include, exclude=exclude, progress=False)
    try:
        for layer in sparse_layers(model).values():
            layer.router.requires_grad_(False)
        yield
    finally:
        densify(model)
