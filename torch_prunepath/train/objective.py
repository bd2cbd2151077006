"""What a step is run at, its loss terms by name, and what is learnt from it; for any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_prunepath.inputs.data import Inputs
from torch_prunepath.inputs.visit import quiet
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.sparsity import layer_tau
from torch_prunepath.train.batches import as_dict, count_labels, count_tokens, is_causal, on_device, with_labels
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.optimizer import trained
from torch_prunepath.train.schedule import aim_at
from torch_prunepath.train.state import Pending, Progress, Record
from torch_prunepath.train.tape import RoutingTape
from torch_prunepath.train.terms import Targets, batch_terms, check_model


class Objective:
    """The part of a training run that is this library's, for a loop of one's own.

    Args:
        model: what the loop calls: a sparse model, or one that is wrapped in ``DistributedDataParallel``, sharded with
            FSDP2, or prepared by accelerate.
        config: phases, weights of the losses and what belongs to them, and the seed. What the loop does itself
            (learning rates, accumulation, clipping) is not read.
        steps: optimiser steps of the whole run; phases are shares of them.
        teacher: the dense model, for ``config.distill_logits``; in evaluation mode.
        progress: a run to go on with; None starts one. Save its ``state_dict()`` in checkpoints.
        across_processes: weigh all processes' tokens alike, rather than all processes.

    Raises:
        ValueError: if model, config and teacher do not fit together.

    Example::

        objective = Objective(model, config, steps=1000)
        for step in range(1000):
            for batch in objective.begin([next(batches)]):
                objective.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            for record in objective.end():
                print(record)
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        steps: int,
        *,
        teacher: nn.Module | None = None,
        progress: Progress | None = None,
        across_processes: bool = False,
    ) -> None:
        self.model, self.config, self.steps, self.teacher = model, config, steps, teacher
        self.inner = unwrapped(model)
        self.tape = RoutingTape(self.inner, inputs=False, outputs=bool(config.distill_ffn))
        check_model(model, self.tape, config, teacher)
        self.progress = Progress(config) if progress is None else progress
        self.device = next(model.parameters()).device
        self.causal = is_causal(self.inner)
        self.tau: float | None = None
        self.stats: dict[str, Tensor] = {}
        self._taus: list[float] = []
        self._targets: list[float | None] = []
        self._by_batch: list[Tensor] = []
        self._across = across_processes
        self._shares: list[tuple[Tensor, Tensor]] = []
        self._number = 0

    def begin(self, group: Sequence[Any]) -> list[Inputs]:
        """Choose the next step's tau, or that of each of its batches (see :class:`Phase`); :meth:`loss` writes it.

        Args:
            group: the batches whose gradients the step adds up.

        Returns:
            The same batches with labels, for :meth:`loss` one after the other.

        Raises:
            ValueError: if a batch is no mapping or lacks labels.
        """
        self._aim(len(group))
        config = self.config
        labelled = "task" in config.losses
        batches = [with_labels(batch, self.causal) if labelled else as_dict(batch) for batch in group]
        by_token = self._parts([count_tokens(batch) for batch in batches])
        by_label = self._parts([count_labels(batch, self.causal) for batch in batches]) if labelled else by_token
        self._shares, self.stats, self._number = list(zip(by_label, by_token, strict=True)), {}, 0
        return batches

    def _aim(self, number: int) -> None:
        """The target and the tau of each batch; the same for all where processes must agree on them."""
        progress, config = self.progress, self.config
        place = (config.phases, progress.step, self.steps, config.seed)
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        aims = [aim_at(*place, *((batch, number) if alone else ())) for batch in range(number)]
        self._targets = [aim.sparsity for aim in aims]
        tau_for = progress.controller.tau_for
        self._taus = [tau_for(aim.sparsity) if aim.tau is None else aim.tau for aim in aims]  # type: ignore[arg-type]
        self._by_batch = []

    def loss(self, batch: Inputs, model: nn.Module | None = None) -> Tensor:
        """Run the model on a batch of the step; the weighted sum of its loss terms, 0-d float32, for ``backward()``.

        Each batch's is its part of the step's: add the gradients up, without dividing them by the number of batches.

        Args:
            batch: the next one of what :meth:`begin` returned.
            model: called in place of the model that the objective was made with, which it wraps.

        Raises:
            ValueError: if the model did not run its sparse layers, gave no loss, or lost their gradients.
        """
        batch = on_device(batch, self.device)
        by_label, by_token = self._shares[self._number]
        self.tau = self._taus[self._number]
        write_tau(self.tape.layers.values(), self.tau)
        terms = self._terms(batch, f"fit {self.config.seed} {self.progress.step} {self._number}", model)
        self._number += 1
        for name, term in terms.items():
            terms[name] = _times(term, by_label if name == "task" else by_token)
        loss = torch.stack([self.config.losses[k] * v.to(self.device) for k, v in terms.items()]).sum()
        sparsity = _times(self.tape.sparsity(), by_token)
        if len(set(self._taus)) > 1:
            self._by_batch += [sparsity.detach(), _times(torch.ones_like(sparsity), by_token)]
        for name, value in {"loss": loss, **terms, "sparsity": sparsity}.items():
            self.stats[name] = self.stats.get(name, 0) + value.detach().to(self.device)
        return loss

    def end(self, lr: float | None = None) -> list[Record]:
        """Note what the step's batches gave. Does not wait for the device to do the step.

        Args:
            lr: the step's learning rate, for the record.

        Returns:
            The record of the step before, if there is one: see :func:`torch_prunepath.train.train`.

        Raises:
            FloatingPointError: if that step's loss is not finite.
        """
        assert self.tau is not None and self.complete, "end() comes after loss() of every batch"
        values = [value.float().to(self.device) for value in (*self.stats.values(), *self._by_batch)]
        means = mean_over_processes(torch.stack(values))
        progress = self.progress
        progress.pending.append(Pending(progress.step, self._taus, self._targets, lr, list(self.stats), means))
        progress.step += 1
        return progress.finished(keep=1)

    @property
    def begun(self) -> bool:
        """Whether :meth:`loss` has seen some batch of the step."""
        return self._number > 0

    @property
    def complete(self) -> bool:
        """Whether :meth:`loss` has seen every batch of the step."""
        return self._number == len(self._shares)

    def _parts(self, counts: list[Tensor]) -> list[Tensor]:
        """Each batch's share of the step; over all processes they sum to the number of processes."""
        counts_B = torch.stack(counts)
        total, scale = counts_B.sum(), 1
        if self._across and dist.is_available() and dist.is_initialized():
            counts_B, total = (value.to(self.device, non_blocking=True) for value in (counts_B, total))
            dist.all_reduce(total)
            scale = dist.get_world_size()
        return list(scale * counts_B / total.clamp_min(1))

    def _terms(self, batch: Inputs, seed: str, model: nn.Module | None) -> dict[str, Tensor]:
        config = self.config
        inputs = quiet(self.inner, batch if "task" in config.losses else self._without_loss(batch))
        teacher_logits = None
        self.tape.inside = Targets(config, seed, self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if config.autocast else contextlib.nullcontext():
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(**quiet(self.teacher, self._without_loss(batch))).logits
            with self.tape:
                output = (self.model if model is None else model)(**inputs)
        self.tape.check(gradient=True)
        return batch_terms(config, self.tape, output, batch, teacher_logits)

    def _without_loss(self, batch: Inputs) -> Inputs:
        """The batch so that a causal language model computes no loss; others may need labels to run."""
        return {k: v for k, v in batch.items() if k != "labels" or not self.causal}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def others_frozen(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """No gradients for parameters that ``config.train`` does not name; afterwards as it was.

    Raises:
        ValueError: if there is nothing to train.
    """
    chosen = trained(model, config)
    # By name: sharding puts other parameters in their place.
    frozen = {name for name, p in model.named_parameters() if p.requires_grad and name not in chosen}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name not in frozen)
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or name in frozen)


@torch.no_grad()
def write_tau(layers: Iterable[RoutedExperts], tau: float) -> None:
    """As :func:`torch_prunepath.set_tau` does with one number, without telling the model's config."""
    for layer in layers:
        layer.tau.fill_(layer_tau(tau, layer.budget))


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean over all processes, so that each chooses the same tau."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


def _times(term: Tensor, share: Tensor) -> Tensor:
    # A 0-d tensor on the CPU is taken as a number; copying it to the device would wait for all that is queued there.
    return term * (share if share.device.type == "cpu" else share.to(term.device))
